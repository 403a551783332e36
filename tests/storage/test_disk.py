"""Estimates of room on the disk, against what the steps of a finished pipeline have written."""

from pathlib import Path

import pytest

import constants
from chatglm_ja.bases.shape import read_shape
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.settings import REPORTS_BYTES, Config, parse
from chatglm_ja.storage import disk
from chatglm_ja.training.settings import CHECKPOINT_BYTES, TrainingConfig
from chatglm_ja.vocabulary.settings import (
    MergeTokenizerConfig,
    ResizeModelConfig,
    TrainTokenizerConfig,
)
from tests.pipeline import SMALL, Runner


def test_every_step_estimates_what_it_writes_and_not_much_more(pipeline: Runner) -> None:
    """Apart from the allowance for reports, which are small."""
    made = pipeline.folder

    def settings(number: int, kind: type[Config], **folders: Path) -> Config:
        defaults = getattr(constants, f"STEP{number}") | {"output_dir": Path("unused"), **folders}
        (script,) = (name for name in SMALL if name.startswith(f"step{number}_"))
        return parse(kind, "", defaults, SMALL[script].split())

    base, tokenizer = made / "base_model", made / "step2_tokenizer"
    training = settings(5, TrainingConfig, model=made / "step3_model")
    counts = training.count_parameters(read_shape(training.model))
    # One more while it is written, and the one before the decay, which stays.
    checkpoints = CHECKPOINT_BYTES * counts.all * (training.keep_checkpoints + 2)
    step1 = made / "step1_tokenizer"
    merging = settings(2, MergeTokenizerConfig, base_model=base, ja_tokenizer=step1)
    resizing = settings(3, ResizeModelConfig, base_model=base, tokenizer=tokenizer)
    estimates = {
        "step1_tokenizer": ("ja_*", settings(1, TrainTokenizerConfig).disk_bytes(), 2.0),
        "step2_tokenizer": ("tok*", merging.disk_bytes(), 3.0),
        "step3_model": ("*.safetensors", resizing.disk_bytes(), 1.2),
        # All sources are tokenized, for a mix of few of their texts.
        "step4_data": ("*.arrow", settings(4, PrepareDataConfig).disk_bytes(), 200.0),
        "step5_pt": ("*.safetensors", training.disk_bytes() - checkpoints, 1.2),
        "step5_pt.before_decay": ("*", CHECKPOINT_BYTES * counts.all + REPORTS_BYTES, 1.2),
    }
    for name, (pattern, estimate, most) in estimates.items():
        size = disk.folder_bytes(made / name, pattern)
        needed = estimate - REPORTS_BYTES
        assert 0.98 * size < needed < most * size, (name, size, needed)


def test_sizes_are_for_people() -> None:
    assert [disk.format_bytes(n) for n in (0, 999, 1000, 3_150_000, 8.1e9, 2e12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "3.1 MB", "8.1 GB", "2.0 TB",
    ]  # fmt: skip


def test_the_disk_is_that_of_a_folder_to_come(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "a" / "b") == pytest.approx(
        disk.free_bytes(tmp_path), rel=0.1
    )


@pytest.mark.parametrize("failure", [OSError(38, "Function not implemented"), None])
def test_a_disk_that_does_not_say_its_size_is_not_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: OSError | None
) -> None:
    def usage(_: Path) -> tuple[int, int, int]:
        if failure:
            raise failure
        return (0, 0, 0)

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    disk.require_free(tmp_path / "a", 10**15)
