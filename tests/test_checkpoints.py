"""Checkpoints: written whole, the last ones kept, and a damaged one never opened."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatglm_ja.checkpoints import MANIFEST, Checkpoints
from chatglm_ja.errors import ArtifactError

RUN = {"lora_rank": 8, "step4_prepare_data": "abc"}
FILES = ("optimizer.safetensors", "random.safetensors", "trainer_state.json", "weights.safetensors")


def fill(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        with checkpoints.write(step) as folder:
            for name in FILES:
                (folder / name).write_bytes(f"{name} of step {step}".encode() * 100)


def test_the_newest_is_found_and_the_last_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", RUN, keep=2)
    assert checkpoints.start(overwrite=False) is None
    fill(checkpoints, 5, 10, 1000)
    assert checkpoints.start(overwrite=False) == tmp_path / "c" / "step-001000"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-000010", "step-001000"]
    checkpoints.remove()
    assert not (tmp_path / "c").exists()


def flip_64_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:164] = bytes(b ^ 255 for b in content[100:164])
    path.write_bytes(content)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def partial(folder: Path) -> None:
    for name in (*FILES[1:], MANIFEST):
        (folder / name).unlink()


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("optimizer missing", lambda f: (f / FILES[0]).unlink(), "optimizer.safetensors is missing"),
    ("random missing", lambda f: (f / FILES[1]).unlink(), "random.safetensors is missing"),
    ("state missing", lambda f: (f / FILES[2]).unlink(), "trainer_state.json is missing"),
    (
        "weights truncated",
        lambda f: (f / FILES[3]).write_bytes((f / FILES[3]).read_bytes()[:99]),
        "weights.safetensors has 99 bytes, expected",
    ),
    ("weights flipped", lambda f: flip_64_bytes(f / FILES[3]), "does not have the SHA-256"),
    ("optimizer flipped", lambda f: flip_64_bytes(f / FILES[0]), "does not have the SHA-256"),
    ("empty", empty, "it has no manifest"),
    ("partial", partial, "it has no manifest"),
    ("manifest damaged", lambda f: (f / MANIFEST).write_text("{"), "its manifest is damaged"),
    ("manifest odd", lambda f: (f / MANIFEST).write_text("[]"), "its manifest is damaged"),
]


@pytest.mark.parametrize(("fault", "message"), [(f, m) for _, f, m in FAULTS])
def test_a_damaged_one_is_passed_over_and_named(
    tmp_path: Path,
    fault: Callable[[Path], object],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoints = Checkpoints(tmp_path, RUN, keep=2)
    fill(checkpoints, 10, 20)
    fault(tmp_path / "step-000020")
    assert checkpoints.start(overwrite=False) == tmp_path / "step-000010"
    assert message in caplog.text and "step-000020" in caplog.text
    # The run comes by that step again, and replaces it.
    fill(checkpoints, 20)
    assert checkpoints.start(overwrite=False) == tmp_path / "step-000020"


def test_an_exception_while_writing_leaves_the_older_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, RUN, keep=1)
    fill(checkpoints, 10)
    with pytest.raises(OSError), checkpoints.write(20) as folder:
        (folder / FILES[0]).write_text("half")
        raise OSError("no space left")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    fill(Checkpoints(tmp_path, RUN, keep=2), 10, 20)
    other = Checkpoints(tmp_path, RUN | {"lora_rank": 16}, keep=2)
    with pytest.raises(ArtifactError, match="of a run with lora_rank=8, not 16: ask for that run"):
        other.start(overwrite=False)
    assert len(list(tmp_path.iterdir())) == 2
    assert other.start(overwrite=True) is None
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
    assert checkpoints.start(overwrite=False) is None
