"""Checkpoints: published atomically, pruned, and never opened if damaged or of other tensors."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ja.errors import ArtifactError
from chatglm_ja.storage import files
from chatglm_ja.training import checkpoints as checkpoints_module
from chatglm_ja.training import train
from chatglm_ja.training.checkpoints import MANIFEST, Checkpoints, State
from chatglm_ja.training.trainer import ResumableTrainer
from tests.training.runs import checkpoints_in, config_for, interrupted_after

RUN: dict[str, Any] = {"lora_rank": 8, "step4_prepare_data": "abc"}
FILES = ("optimizer.safetensors", "weights.safetensors")


def fill(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.write(step, {name: {"x": torch.full((99,), step)} for name in FILES})


def test_the_newest_is_found_and_the_last_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", RUN, keep=2)
    assert checkpoints.find_newest(overwrite=False) is None
    fill(checkpoints, 5, 10, 1000)
    assert checkpoints.find_newest(overwrite=False) == tmp_path / "c" / "step-001000"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-000010", "step-001000"]


def test_its_files_have_the_mode_that_the_umask_allows(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        fill(Checkpoints(tmp_path, RUN, keep=2), 5)
    finally:
        os.umask(umask)
    for name in ("weights.safetensors", MANIFEST):
        assert (tmp_path / "step-000005" / name).stat().st_mode & 0o777 == 0o640


def test_damaged_ones_do_not_count_among_those_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged newer checkpoints do not displace intact older ones."""
    monkeypatch.setattr(files, "HASHED_BYTES", 0)  # the bytes of large checkpoints count as well
    checkpoints = Checkpoints(tmp_path, RUN, keep=1)
    fill(checkpoints, 10)
    damaged = Checkpoints(tmp_path, RUN, keep=9)
    fill(damaged, 30, 40)
    for step in (30, 40):
        path = tmp_path / f"step-{step:06d}" / FILES[0]
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    (tmp_path / "step-000009").write_text("no folder")
    assert checkpoints.find_newest(overwrite=False) == tmp_path / "step-000010"
    assert checkpoints.describe_resume() == "re-run the command to resume from step 10"
    assert len(list(tmp_path.glob("damaged-step-*"))) == 2
    fill(checkpoints, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000009", "step-000020"]


def test_an_exception_while_writing_leaves_the_older_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, RUN, keep=1)
    fill(checkpoints, 10)
    checkpoints.start_writing(20, {FILES[0]: {"x": torch.zeros(1)}, "no/folder.json": {}})
    with pytest.raises(FileNotFoundError):
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    fill(Checkpoints(tmp_path, RUN, keep=2), 10, 20)
    other = Checkpoints(tmp_path, RUN | {"lora_rank": 16}, keep=2)
    with pytest.raises(ArtifactError, match="of a run with lora_rank=8, not 16: use that run"):
        other.find_newest(overwrite=False)
    assert len(list(tmp_path.iterdir())) == 2
    assert other.find_newest(overwrite=True) is None
    assert not list(tmp_path.iterdir())


def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", RUN, keep=2)
    fill(checkpoints, 10)
    secret = tmp_path / "secret"
    secret.write_text("x")
    manifest = tmp_path / "c" / "step-000010" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"]["../../secret"] = content["files"].pop(FILES[0])
    manifest.write_text(json.dumps(content))
    assert checkpoints.find_newest(overwrite=False) is None


def test_other_folders_are_not_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, RUN, keep=2)
    (tmp_path / "step-by-step").mkdir()
    fill(checkpoints, 999_999, 1_000_000)
    assert checkpoints.find_newest(overwrite=False) == tmp_path / "step-1000000"
    assert checkpoints.describe_resume() == "re-run the command to resume from step 1000000"


def test_a_checkpoint_without_disk_space_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, RUN, keep=1)
    fill(checkpoints, 10)
    assert not checkpoints.is_ready(20, needed=10**18)
    assert f"no checkpoint at step 20: {tmp_path}/step-000020 takes 1000000.0 TB" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


@pytest.fixture(scope="module")
def stopped(
    resized_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Settings of a run that was interrupted after a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    settings: dict[str, Any] = {
        "resized_dir": resized_dir, "data_dir": data_dir, "output": folder, "save_steps": 2,
        "evaluations": 0, "lora_targets": ("q_proj", "v_proj"),
    }  # fmt: skip
    with interrupted_after(2):
        train.train(config_for(**settings), "pretrain", None, checkpoints_in(folder))
    return settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_targets": ("v_proj",)}, r"holds .*q_proj\.lora_A.*, which this run does not"),
        ({"lora_targets": ("v_proj", "o_proj")}, r"lacks .*o_proj\.lora_A.*, which this run"),
        ({"lora_rank": 4}, r"lora_A.* with shape \(8, 64\), but this run trains \(4, 64\)"),
        ({"train_embeddings": False}, r"holds .*lm_head\.weight, which this run does not train"),
        ({"embedding_rows": "new"}, r"lacks .*lm_head\.new, which this run trains"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused_whole(
    stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(checkpoints_module, "_scatter", lambda *_: loaded.append("something"))
    config = config_for(**stopped | changes)
    with pytest.raises(ArtifactError, match=message) as refused:
        train.train(config, "pretrain", None, checkpoints_in(stopped["output"]))
    assert str(refused.value).endswith(f"or remove {stopped['output']}/checkpoints to start again")
    assert not loaded


def test_training_goes_on_while_a_checkpoint_is_written(
    stopped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written after the next step is the state before it."""
    config = config_for(**stopped | {"output": tmp_path, "max_steps": 3, "save_steps": 2})
    is_trained = threading.Event()
    write, end_step = Checkpoints.write, ResumableTrainer.end_step

    def write_late(self: Checkpoints, step: int, state: State, *more: Any) -> None:
        assert is_trained.wait(60)
        write(self, step, state)

    def end(self: ResumableTrainer) -> None:
        end_step(self)
        if self.state.global_step == 3:
            is_trained.set()

    monkeypatch.setattr(Checkpoints, "write", write_late)
    monkeypatch.setattr(ResumableTrainer, "end_step", end)
    train.train(config, "pretrain", None, checkpoints_in(tmp_path))
    written = "checkpoints/step-000002/weights.safetensors"
    expected = stopped["output"] / written
    assert (tmp_path / written).read_bytes() == expected.read_bytes()


def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    stopped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the next step, not at the next checkpoint."""
    config = config_for(**stopped | {"output": tmp_path, "max_steps": 9, "save_steps": 2})
    steps: list[int] = []

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    def start(self: Checkpoints, step: int, state: State, *more: Any) -> None:
        start_writing(self, step, state)
        assert self._written is not None
        self._written.exception()  # waits
        steps.append(step)

    start_writing = Checkpoints.start_writing
    monkeypatch.setattr(Checkpoints, "write", fail)
    monkeypatch.setattr(Checkpoints, "start_writing", start)
    with pytest.raises(OSError, match="no space left"):
        train.train(config, "pretrain", None, checkpoints_in(tmp_path))
    assert steps == [2]
