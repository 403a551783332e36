"""Bad losses and gradients in one process: the step is skipped, or the run stops."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ja.errors import DataError
from chatglm_ja.training import spikes, train
from tests.faults.forks import Forks
from tests.faults.ledger import Ledger
from tests.training.runs import adapter, config_for, with_losses


@pytest.mark.parametrize("clipping", [1.0, 0.0])
@pytest.mark.parametrize(
    ("fault", "factor", "reason"),
    [
        ("the loss of a step is NaN", math.nan, "the training loss is nan"),
        ("the loss of a step is infinite", math.inf, "the training loss is inf"),
        ("a corrupted batch: a loss 50 times the usual", 50.0, "the training loss is"),
        ("the gradients of a step are NaN", math.nan, "the norm of the gradients is nan"),
    ],
)
def test_a_bad_step_changes_no_weight(
    resized_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, ledger: Ledger, thorough: bool, fault: str, factor: float,
    reason: str, clipping: float,
) -> None:  # fmt: skip
    if not thorough and not clipping:
        pytest.skip("--thorough tries without gradient clipping, too")
    monkeypatch.setattr(spikes, "WINDOW", 3)
    weights = with_losses(monkeypatch, of_gradients="gradients" in fault, step5=factor)
    config = config_for(resized_dir, data_dir, tmp_path, max_steps=7, max_grad_norm=clipping)
    with ledger.trial("numbers", fault) as row:
        result = train.train(config, "pretrain", None)
        (row.reads,) = (r.getMessage() for r in caplog.records if "is skipped" in r.getMessage())
        assert row.reads.startswith(f"step 5 is skipped: {reason}")
        same = [
            all(torch.equal(before[name], after[name]) for name in before)
            for before, after in itertools.pairwise(weights)
        ]
        # At step 5 nothing changes; at step 1 the learning rate is 0.
        assert same == [True, False, False, False, True, False]
        assert all(
            math.isfinite(e["loss"]) and e["loss"] < 10 for e in result["history"] if "loss" in e
        )
        # history.json is valid JSON, with a norm of 0 for the step that was not taken.
        json.dumps(result["history"], allow_nan=False)
        norms = [entry["grad_norm"] for entry in result["history"] if "grad_norm" in entry]
        assert [step for step, norm in enumerate(norms, start=1) if norm == 0] == [5]


def test_a_bad_micro_batch_skips_its_whole_step(
    resized_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of the good micro-batch before it is learned, then or later."""
    ends = []
    for bad in ("step3batch2", "step3"):
        with monkeypatch.context() as patch:
            factors: dict[str, Any] = {bad: math.nan}
            with_losses(patch, **factors)
            config = config_for(
                resized_dir, data_dir, tmp_path / bad, micro_batch_size=4, max_steps=5,
                evaluations=0,
            )  # fmt: skip
            train.train(config, "pretrain", tmp_path / bad)
        ends.append(adapter(tmp_path / bad))
    assert ends[0] == ends[1]


def test_good_steps_between_bad_ones_are_counted(
    resized_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only consecutive skipped steps stop a run."""
    bad: dict[str, Any] = {f"step{n}": math.nan for n in (3, 4, 6, 7, 9, 10)}
    with_losses(monkeypatch, **bad)
    config = config_for(
        resized_dir, data_dir, tmp_path, max_steps=11, max_skipped_steps=2, evaluations=0
    )
    assert train.train(config, "pretrain", None)["steps"] == 11


def test_one_long_answer_among_short_ones_is_learned_from(
    resized_dir: Path, data_dir: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Micro-batches of one conversation each, of very different lengths."""
    config = config_for(
        resized_dir, data_dir, tmp_path, packing=False, micro_batch_size=1, global_batch_size=4,
        block_size=256, max_steps=8, epochs=9.0, evaluations=0, learning_rate=1e-3,
    )  # fmt: skip
    train.train(config, "sft", None)
    assert "is skipped" not in caplog.text


def test_a_jump_in_the_first_steps_is_skipped(
    resized_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with_losses(monkeypatch, step5=50.0)
    config = config_for(resized_dir, data_dir, tmp_path, evaluations=0)
    train.train(config, "pretrain", None)
    assert "step 5 is skipped" in caplog.text


def test_many_bad_steps_stop_the_run_with_advice(
    resized_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    ledger: Ledger,
) -> None:  # fmt: skip
    nothing: dict[str, Any] = {f"step{n}": math.nan for n in range(3, 99)}
    with_losses(monkeypatch, **nothing)
    config = config_for(resized_dir, data_dir, tmp_path, max_steps=50, max_skipped_steps=4)
    with ledger.trial("numbers", "the loss of every step from the third on is NaN") as row:
        with pytest.raises(
            DataError, match=r"is nan at step 7, after .* and 4 steps in a row .* lower"
        ) as stopped:
            train.train(config, "pretrain", None)
        row.reads = f"error: {stopped.value}"


def test_a_learning_rate_that_diverges_stops_the_run(
    forks: Forks, ledger: Ledger, tmp_path: Path
) -> None:
    """A real one: nothing is patched."""
    flags = (
        "--learning-rate 1 --embedding-learning-rate 1 --max-steps 60 --epochs 50 --evaluations 0"
    )
    with ledger.trial("numbers", "a learning rate of 1") as row:
        ended = forks.small(
            "step5_train_pt.py", *flags.split(), "--tracker", "none",
            "--output-dir", str(tmp_path / "out"),
        )  # fmt: skip
        row.reads = ended.error
        assert "steps in a row were skipped for that: lower --learning-rate" in row.reads


def test_a_run_that_diverges_slowly_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    """The loss rises by a tenth per step, which is no jump against the mean of the last ones."""
    guard = spikes.SpikeGuard(max_jump=3.0, max_skipped=5)
    loss, step = 4.0, 1
    while not caplog.records:
        guard.end_step(step, [loss], 1.0)
        loss, step = 1.1 * loss, step + 1
        assert step < 100
    assert loss / 1.1 > 3 * guard.lowest_mean


def test_a_resumed_run_knows_the_losses_before_it() -> None:
    guard = spikes.SpikeGuard(max_jump=3.0, max_skipped=5)
    for step, loss in enumerate([2.0] * 20 + [4.0] * 20, start=1):
        guard.end_step(step, [loss], 1.0)
    resumed = spikes.SpikeGuard(max_jump=3.0, max_skipped=5)
    resumed.restore(json.loads(json.dumps(guard.state())))
    assert (resumed.lowest_mean, resumed.mean, resumed.limit) == (2.0, 4.0, 6.0)
    resumed.end_step(41, [6.5], 1.0)
    assert resumed.skipped == 1
