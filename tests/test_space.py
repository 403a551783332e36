"""Estimates of room on the disk, against what the steps of a finished pipeline have written."""

from pathlib import Path

import pytest

import constants
from chatglm_ja import config, costs, space
from chatglm_ja.artifacts import read_manifest
from chatglm_ja.settings import parse
from tests.pipeline import SMALL, Runner

STEP1 = "step1_tokenizer"


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
    merged = read_manifest(made / "step2_tokenizer")
    assert merged is not None
    rows = merged["counts"]["vocabulary"]
    estimates = {
        "step1_tokenizer": ("ja_*", space.of_learned(2500), 2.0),
        "step2_tokenizer": ("tok*", space.of_merged(made / "base_model", made / STEP1), 3.0),
        "step3_model": ("*.safetensors", space.of_resized(made / "base_model", rows), 1.2),
        # All sources are read, for a mix of few of their texts.
        "step4_data": ("*.arrow", space.of_data(data), 200.0),
        "step5_pt": ("*.safetensors", space.of_training(training) - checkpoints, 1.2),
    }
    for name, (pattern, estimate, most) in estimates.items():
        size = space.total_bytes(made / name, pattern)
        needed = estimate - space.REPORTS_BYTES
        assert 0.98 * size < needed < most * size, (name, size, needed)


def test_sizes_are_for_people() -> None:
    assert [space.text(n) for n in (0, 999, 1000, 3_150_000, 8.1e9, 2e12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "3.1 MB", "8.1 GB", "2.0 TB",
    ]  # fmt: skip


def test_the_disk_is_that_of_a_folder_to_come(tmp_path: Path) -> None:
    assert space.free_bytes(tmp_path / "a" / "b") == pytest.approx(
        space.free_bytes(tmp_path), rel=0.1
    )
