"""The Trainer under DeepSpeed, in one process or two, with a scaled loss in float16, and what of it
would wait for a GPU."""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from chatglm_ja.training import adapter as adapters
from chatglm_ja.training import train
from chatglm_ja.training.trainer import ResumableTrainer
from tests.training.runs import (
    adapter,
    checkpoints_in,
    config_for,
    interrupted_after,
    train_under_deepspeed,
    with_losses,
)

History = list[dict[str, Any]]


def losses(history: History) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in history if "loss" in e]


def test_the_loss_logged_after_a_resume_is_that_of_an_undisturbed_run(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Two processes save between two log lines. Resumed by two, the run is the same to the bit."""
    settings: dict[str, Any] = {
        "max_steps": 5, "save_steps": 3, "logging_steps": 2, "evaluations": 0,
        "micro_batch_size": 2,
    }  # fmt: skip
    two, again, one = (tmp_path / name for name in ("two", "again", "one"))
    expected = losses(train_under_deepspeed(2, resized_dir, data_dir, two, settings)["history"])
    assert [step for step, _, _ in expected] == [2, 4, 5]
    for folder in (again, one):
        shutil.copytree(two / "checkpoints", folder / "checkpoints")
    resumed = train_under_deepspeed(2, resized_dir, data_dir, again, settings)
    assert losses(resumed["history"]) == expected
    assert adapter(again) == adapter(two)
    config = config_for(resized_dir, data_dir, one, **settings)
    history = train.train(config, "pretrain", None, checkpoints_in(one))["history"]
    for found, undisturbed in zip(losses(history), expected, strict=True):
        assert found == pytest.approx(undisturbed, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rotary_frequencies_stay_in_single_precision(
    resized_dir: Path, data_dir: Path, tmp_path: Path, precision: str
) -> None:
    """In half precision, positions a few hundred tokens into a document would be indistinct."""
    settings = {"max_steps": 1, "evaluations": 0, "precision": precision}
    report = train_under_deepspeed(1, resized_dir, data_dir, tmp_path, settings)
    assert report["weights"] == {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
    assert report["rotary"] == ["torch.float32", True]


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the Trainer compute in float16 on the CPU; gives the loss scale after each step."""
    create = ResumableTrainer.create_accelerator_and_postprocess
    end_step = ResumableTrainer.end_step
    found: list[float] = []

    def create_scaled(self: Any) -> None:
        create(self)
        # As accelerate does on a GPU.
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def noted(self: Any) -> None:
        found.append(self.accelerator.scaler.get_scale())
        end_step(self)

    monkeypatch.setattr(adapters, "choose_dtype", lambda _: torch.float16)
    monkeypatch.setattr(ResumableTrainer, "create_accelerator_and_postprocess", create_scaled)
    monkeypatch.setattr(ResumableTrainer, "end_step", noted)
    return found


@pytest.mark.parametrize("clipping", [1.0, 0.0])
@pytest.mark.parametrize(
    ("factor", "of_gradients"), [(math.nan, False), (50.0, False), (math.inf, True)]
)
def test_a_skipped_step_in_float16_halves_the_scale_and_changes_no_weight(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scales: list[float], factor: float, of_gradients: bool, clipping: float,
) -> None:  # fmt: skip
    """A bad loss is skipped as an overflow of the gradients is: by the scaler."""
    weights = with_losses(monkeypatch, of_gradients, step5=factor)
    config = config_for(
        resized_dir, data_dir, tmp_path, max_steps=7, evaluations=0, micro_batch_size=4,
        max_grad_norm=clipping,
    )  # fmt: skip
    train.train(config, "pretrain", None)
    assert scales == [2.0**16] * 4 + [2.0**15] * 3
    before = weights[::2]  # a step has two micro-batches
    same = [
        all(torch.equal(old[name], new[name]) for name in old)
        for old, new in itertools.pairwise(before)
    ]
    assert same == [True, False, False, False, True, False]  # the first step's rate is 0


def test_a_run_in_float16_resumes_with_its_scale(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scales: list[float],
) -> None:  # fmt: skip
    with_losses(monkeypatch, step2=math.inf)
    ends = []
    for name in ("once", "twice"):
        folder = tmp_path / name
        config = config_for(resized_dir, data_dir, folder, max_steps=5, evaluations=0, save_steps=3)
        if name == "twice":
            with interrupted_after(3):
                train.train(config, "pretrain", folder, checkpoints_in(folder))
        train.train(config, "pretrain", folder, checkpoints_in(folder))
        ends.append(adapter(folder))
    assert ends[0] == ends[1]
    assert scales == [2.0**16, *[2.0**15] * 4] * 2


aten = torch.ops.aten
# Calls whose result the host reads, or whose size it needs.
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
READING_OPS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select}
INDEXING_OPS = {aten.index, aten.index_put, aten.index_put_}


@contextmanager
def noting_waits() -> Iterator[list[str]]:
    """Give a list of the calls for which the host would wait if the tensors were on a GPU."""
    names: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, call: Any, _: Any, args: Any = (), named: Any = None) -> Any:
            if call in READS:
                names.append(call.__name__)
            return call(*args, **(named or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, _: Any, args: Any = (), named: Any = None) -> Any:
            operation = call.overloadpacket
            masks = args[1] if operation in INDEXING_OPS else ()
            if operation in READING_OPS or any(
                mask is not None and mask.dtype == torch.bool for mask in masks
            ):
                names.append(str(operation))
            return call(*args, **(named or {}))

    with Functions(), Operations():
        yield names


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.ones(1)),
        lambda x: torch.equal(x, x),
    ],
)
def test_waits_are_noticed(wait: Callable[[torch.Tensor], Any]) -> None:
    with noting_waits() as names:
        values = torch.arange(3.0)
        values[torch.tensor([1, 2])] = values.mul(2)[torch.tensor([0, 1])]
        assert names == []
        wait(values)
        assert len(names) == 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pretrain", {}),
        ("pretrain", {"embedding_rows": "new", "gradient_checkpointing": "selective"}),
        ("sft", {"block_size": 256, "global_batch_size": 4, "packing": False, "epochs": 9.0}),
    ],
)
def test_the_host_waits_for_a_gpu_once_in_a_step(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    """At its end, and in none of its micro-batches."""
    steps: list[list[str]] = []
    get_batches, end_step = ResumableTrainer.get_batch_samples, ResumableTrainer.end_step
    with ExitStack() as watched, monkeypatch.context() as patch:

        def begin(*given: Any) -> Any:
            batches = get_batches(*given)  # made by the host
            steps.append(watched.enter_context(noting_waits()))
            return batches

        def end(self: Any) -> None:
            assert steps[-1] == []
            end_step(self)
            watched.close()

        patch.setattr(ResumableTrainer, "get_batch_samples", begin)
        patch.setattr(ResumableTrainer, "end_step", end)
        settings: dict[str, Any] = {"max_steps": 3, "micro_batch_size": 2, "evaluations": 0}
        train.train(config_for(resized_dir, data_dir, tmp_path, **settings | changes), name, None)
    assert steps == [["tolist"]] * 3
