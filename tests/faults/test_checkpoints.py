"""A run resumes from the older checkpoint if the newest is damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatglm_ja.bases.shape import read_shape
from chatglm_ja.storage import disk
from chatglm_ja.storage.files import MANIFEST
from chatglm_ja.training import train
from chatglm_ja.training.settings import CHECKPOINT_BYTES, TrainingConfig
from tests.faults.ledger import Ledger
from tests.training.runs import adapter, checkpoints_in, config_for, interrupted_after

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
SCHEDULE, RANDOM, STATE = "progress.json", "random.safetensors", "trainer_state.json"


def missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flipped(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-5000:-4936] = bytes(byte ^ 255 for byte in content[-5000:-4936])
    (folder / WEIGHTS).write_bytes(content)


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def partial(folder: Path) -> None:
    for name in (MANIFEST, OPTIMIZER, STATE):
        (folder / name).unlink()


def linked_out(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent.parent / "elsewhere")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "optimizer missing": (missing(OPTIMIZER), f"{OPTIMIZER} is missing"),
    "scheduler missing": (missing(SCHEDULE), f"{SCHEDULE} is missing"),
    "random generators missing": (missing(RANDOM), f"{RANDOM} is missing"),
    "trainer state missing": (missing(STATE), f"{STATE} is missing"),
    "weights truncated": (truncated, "bytes, expected"),
    "64 bytes of the weights flipped": (flipped, "does not have the SHA-256 of its manifest"),
    "empty folder": (empty, "it has no manifest"),
    "partial folder": (partial, "it has no manifest"),
    "manifest cut": (lambda f: (f / MANIFEST).write_text("{"), "its manifest is damaged"),
    "manifest of other JSON": (
        lambda f: (f / MANIFEST).write_text('{"run": {}, "files": {"x": 1}}'),
        "its manifest is damaged",
    ),
    "weights a link to a file elsewhere": (linked_out, "lies outside of it"),
}


@pytest.fixture(scope="module")
def interrupted(
    resized_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingConfig, Path, bytes]:
    """A run interrupted after its second checkpoint, and the adapter of an uninterrupted one."""
    root = tmp_path_factory.mktemp("interrupted")
    config = config_for(resized_dir, data_dir, root / "output", save_steps=2, evaluations=0)
    train.train(config, "pretrain", root / "once", checkpoints_in(root / "once"))
    with interrupted_after(4):
        train.train(config, "pretrain", root / "twice", checkpoints_in(root / "twice"))
    return config, root / "twice", adapter(root / "once")


def test_a_checkpoint_takes_the_estimated_disk_space(
    interrupted: tuple[TrainingConfig, Path, bytes],
) -> None:
    config, folder, _ = interrupted
    trained = config.count_parameters(read_shape(config.model)).all
    size = disk.folder_bytes(folder / "checkpoints" / "step-000004")
    assert 0.98 * size < CHECKPOINT_BYTES * trained < size


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_resumes_from_the_older_checkpoint(
    interrupted: tuple[TrainingConfig, Path, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ledger: Ledger,
    fault: str,
) -> None:
    config, folder, expected = interrupted
    target = tmp_path / "run"
    shutil.copytree(folder, target)
    damage, message = FAULTS[fault]
    damage(target / "checkpoints" / "step-000004")
    caplog.set_level("INFO")
    with ledger.trial("checkpoints", fault) as row:
        train.train(config, "pretrain", target, checkpoints_in(target))
        assert adapter(target) == expected
        said = [record.getMessage() for record in caplog.records]
        (row.reads,) = [line for line in said if line.startswith("skipping the checkpoint")]
        assert message in row.reads and "step-000004" in row.reads
        assert any("resuming from" in line and "step-000002" in line for line in said)
