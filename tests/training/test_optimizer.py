"""AdamW with 8-bit moments: what it trains, skips and resumes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatglm_ja.errors import ConfigError
from chatglm_ja.training import train
from chatglm_ja.training.checkpoints import OPTIMIZER, Checkpoints
from chatglm_ja.training.settings import TrainingConfig
from chatglm_ja.training.validation import ALL_LOSS
from tests.pipeline import PROJECT
from tests.training.runs import (
    adapter,
    checkpoints_in,
    config_for,
    interrupted_after,
    with_losses,
)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Without the minute in which a CPU's compiler makes a kernel for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_it_learns_as_with_float32_moments_and_resumes_to_the_bit(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    losses, adapters = {}, {}
    for name, optimizer in (("whole", "adamw"), ("once", "adamw_8bit"), ("twice", "adamw_8bit")):
        folder = tmp_path / name
        config = config_for(
            resized_dir, data_dir, folder, optimizer=optimizer, evaluations=1, save_steps=3
        )
        if name == "twice":
            with interrupted_after(3):
                train.train(config, "pretrain", folder, checkpoints_in(folder))
        history = train.train(config, "pretrain", folder, checkpoints_in(folder))["history"]
        losses[name] = [entry[ALL_LOSS] for entry in history if ALL_LOSS in entry][-1]
        adapters[name] = adapter(folder)
    assert losses["once"] == pytest.approx(losses["whole"], rel=2e-3)
    assert adapters["whole"] != adapters["once"] == adapters["twice"]
    saved = [tmp_path / name / "checkpoints/step-000003" / OPTIMIZER for name in ("whole", "twice")]
    sizes = [path.stat().st_size for path in saved]
    assert sizes[1] < 0.3 * sizes[0]


def test_a_bad_step_changes_neither_weights_nor_moments(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = with_losses(monkeypatch, step4=math.inf)
    config = config_for(
        resized_dir, data_dir, tmp_path, optimizer="adamw_8bit", evaluations=0, save_steps=1
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", {}, keep=9)
    train.train(config, "pretrain", tmp_path, checkpoints)
    assert all(torch.equal(weights[3][name], weights[4][name]) for name in weights[3])
    assert not all(torch.equal(weights[4][name], weights[5][name]) for name in weights[4])
    third, fourth = (load_file(tmp_path / f"checkpoints/step-00000{n}" / OPTIMIZER) for n in (3, 4))
    assert third.keys() == fourth.keys()
    assert all(torch.equal(third[name], fourth[name]) for name in third)
    assert all(tensor.isfinite().all() for tensor in fourth.values())


def test_it_is_refused_where_it_cannot_run(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configure(**changes: Any) -> TrainingConfig:
        return config_for(resized_dir, data_dir, tmp_path, optimizer="adamw_8bit", **changes)

    with pytest.raises(ConfigError, match="adamw_8bit is for one GPU"):
        configure(deepspeed=PROJECT / "ds_zero2.json")
    with pytest.raises(ConfigError, match="adamw_8bit is for one GPU"):
        configure(estimate=4)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs torchao: run `pip install"):
        configure()
    configure(estimate=1)
