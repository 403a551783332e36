"""Estimates of room on the disk, against what the steps of a finished pipeline have written."""

from pathlib import Path

import pytest

import constants
from chatglm_ja import config, costs, space
from chatglm_ja.settings import parse
from tests.pipeline import SMALL, Runner


def test_every_step_asks_for_what_it_writes_and_not_much_more(pipeline: Runner) -> None:
    """Beside the allowance for reports, which are small."""
    made = pipeline.folder

    def settings(step: str, kind: type, **folders: Path) -> config.StepConfig:
        defaults = getattr(constants, step) | {"output_dir": Path("unused"), **folders}
        (script,) = (name for name in SMALL if name.startswith(step.lower() + "_"))
        return parse(kind, "", defaults, SMALL[script].split())

    data = settings("STEP4", config.PrepareDataConfig)
    assert isinstance(data, config.PrepareDataConfig)
    model = made / "step3_model"
    training = settings("STEP5", config.TrainingConfig, model=model)
    assert isinstance(training, config.TrainingConfig)
    counts = costs.trained_parameters(costs.read_shape(model), training)
    checkpoints = space.MOMENTS_BYTES * counts.all * (training.keep_checkpoints + 1)
    estimates = {
        "step1_tokenizer": (space.of_learned(2500), 2.0),
        "step2_tokenizer": (space.of_merged(made / "base_model", made / "step1_tokenizer"), 2.0),
        "step3_model": (space.of_resized(made / "base_model", 5000), 1.5),
        # All sources are read, for a mix of few of their texts.
        "step4_data": (space.of_data(data), 100.0),
        "step5_pt": (space.of_training(training) - checkpoints, 1.5),
    }
    for name, (estimate, most) in estimates.items():
        size = space.total_bytes(made / name)
        needed = estimate - space.REPORTS_BYTES
        assert 0.8 * size < needed + 300_000 and needed < most * size, (name, size, needed)


def test_sizes_are_for_people() -> None:
    assert [space.text(n) for n in (0, 999, 1000, 3_150_000, 8.1e9, 2e12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "3.1 MB", "8.1 GB", "2.0 TB",
    ]  # fmt: skip


def test_the_disk_is_that_of_a_folder_to_come(tmp_path: Path) -> None:
    assert space.free_bytes(tmp_path / "a" / "b") == pytest.approx(
        space.free_bytes(tmp_path), rel=0.1
    )
