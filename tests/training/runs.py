"""Training runs of seconds, in the test's own process."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ja.training.adapter import ADAPTER
from chatglm_ja.training.checkpoints import Checkpoints
from chatglm_ja.training.settings import TrainingConfig
from chatglm_ja.training.trainer import ResumableTrainer
from tests.pipeline import PROJECT


def config_for(
    resized_dir: Path,
    data_dir: Path,
    output: Path,
    kind: type[TrainingConfig] = TrainingConfig,
    **changes: Any,
) -> TrainingConfig:
    settings: dict[str, Any] = {
        "model": resized_dir,
        "data": data_dir,
        "output_dir": output,
        "learning_rate": 1e-2,
        "embedding_learning_rate": 1e-2,
        "max_steps": 6,
        "evaluations": 4,
        "logging_steps": 1,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "block_size": 64,
        "tracker": "none",
    }
    return kind(**settings | changes)


def checkpoints_in(folder: Path, **run: Any) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", run, keep=2)


def train_under_deepspeed(
    processes: int, resized_dir: Path, data_dir: Path, folder: Path, changes: dict[str, Any]
) -> dict[str, Any]:
    """Train in processes of their own; return the report of program.py."""
    settings = {"model": str(resized_dir), "data": str(data_dir), **changes}
    environment = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-m", "chatglm_ja.training.launch", "--standalone",
         "--nproc_per_node", str(processes), str(PROJECT / "tests/training/program.py"),
         json.dumps(settings), str(folder)],
        env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "report.json").read_text())


def adapter(folder: Path) -> bytes:
    return (folder / ADAPTER / "adapter_model.safetensors").read_bytes()


@contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """Interrupt the run inside as soon as the checkpoint of a step is written."""
    whole = ResumableTrainer._save_checkpoint

    def dying(self: Any, *arguments: Any) -> None:
        whole(self, *arguments)
        if self.state.global_step == step:
            self.checkpoints.wait()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableTrainer, "_save_checkpoint", dying)
        yield


def with_losses(
    monkeypatch: pytest.MonkeyPatch, of_gradients: bool = False, **factors: float
) -> list[dict[str, torch.Tensor]]:
    """Multiply the loss of steps (step3=...) or micro-batches (step3batch2=...), or only gradients.

    Returns a list that gets the trained weights before every micro-batch.
    """
    whole = ResumableTrainer.compute_loss
    weights: list[dict[str, torch.Tensor]] = []
    micro_batches: Counter[int] = Counter()

    def losses(self: Any, model: Any, *arguments: Any, **named: Any) -> Any:
        trained = self.model.named_parameters()
        weights.append({n: p.detach().clone() for n, p in trained if p.requires_grad})
        loss: Any = whole(self, model, *arguments, **named)
        step = self.state.global_step + 1
        micro_batches[step] += 1
        whole_step = factors.get(f"step{step}", 1.0)
        factor = factors.get(f"step{step}batch{micro_batches[step]}", whole_step)
        if of_gradients:
            loss.register_hook(lambda gradient: gradient * factor)
            return loss
        return loss * factor

    monkeypatch.setattr(ResumableTrainer, "compute_loss", losses)
    return weights
