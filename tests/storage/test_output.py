"""Hand-off folders: whole or absent, refused when damaged or made from something else."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatglm_ja.errors import ArtifactError
from chatglm_ja.settings import StepConfig, setting
from chatglm_ja.source_files import file_format
from chatglm_ja.sources import Source
from chatglm_ja.storage import disk, files
from chatglm_ja.storage.inputs import (
    Input,
    merge_lineage,
    open_artifact,
    open_artifact_or_file,
    open_files,
    open_sources,
)
from chatglm_ja.storage.manifest import read_manifest
from chatglm_ja.storage.output import Output
from tests.conftest import PROJECT


@dataclass(frozen=True, kw_only=True)
class Config(StepConfig):
    size: int = setting("something that shapes the result", 0)


def make(
    path: Path,
    step: str = "step1_x",
    content: str = "content",
    inputs: list[Input] | None = None,
    overwrite: bool = False,
    **arguments: Any,
) -> bool:
    """Publish a small artifact; False when it was finished already."""
    output = Output(Config(output_dir=path, overwrite=overwrite, **arguments), step, inputs or [])
    if not output.prepare():
        return False
    with output.write() as folder:
        (folder / "data.txt").write_text(content)
    return True


def test_a_published_folder_opens(tmp_path: Path) -> None:
    make(tmp_path / "a")
    artifact = open_artifact(tmp_path / "a", "step1_x.py")
    assert artifact.role == "step1_x"
    assert artifact.manifest is not None
    assert artifact.manifest.files["data.txt"].bytes == 7


def test_a_missing_artifact_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a not found: run step1_x\.py first"):
        open_artifact(tmp_path / "a", "step1_x.py")
    (tmp_path / "a").mkdir()
    with pytest.raises(ArtifactError, match=r"not a finished artifact.*run step1_x\.py first"):
        open_artifact(tmp_path / "a", "step1_x.py")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_text("contend"), "SHA-256"),
        (lambda f: f.write_text("cont"), "has 4 bytes, expected 7"),
        (lambda f: f.write_text("content and more"), "has 16 bytes, expected 7"),
        (lambda f: f.unlink(), "is missing"),
    ],
)
def test_a_damaged_artifact_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    make(tmp_path / "a")
    damage(tmp_path / "a" / "data.txt")
    with pytest.raises(ArtifactError, match=message):
        open_artifact(tmp_path / "a", "step1_x.py")
    with pytest.raises(ArtifactError, match=message):
        make(tmp_path / "a")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        open_artifact(tmp_path / "a", "step1_x.py")


def test_an_artifact_of_another_step_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="was made by step1_x, expected the output of step2_y"):
        open_artifact(tmp_path / "a", "step2_y.py")


def test_a_finished_step_does_nothing_unless_told(tmp_path: Path) -> None:
    assert make(tmp_path / "a", size=1)
    assert not make(tmp_path / "a", content="new", size=1)
    assert (tmp_path / "a" / "data.txt").read_text() == "content"
    with pytest.raises(ArtifactError, match="was made with size=1, not 2: pass --overwrite") as e:
        make(tmp_path / "a", size=2)
    assert "to keep it, choose another --output-dir, or another CHATGLM_JA_ARTIFACTS" in str(
        e.value
    )
    assert make(tmp_path / "a", content="new", overwrite=True, size=2)
    assert (tmp_path / "a" / "data.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_other_inputs_are_refused_with_both_fingerprints(tmp_path: Path) -> None:
    source = tmp_path / "corpus.txt"
    source.write_text("one")
    first = open_files("corpus", source)
    make(tmp_path / "a", inputs=[first])
    source.write_text("two")
    second = open_files("corpus", source)
    with pytest.raises(ArtifactError) as error:
        make(tmp_path / "a", inputs=[second])
    assert first.fingerprint[:12] in str(error.value)
    assert second.fingerprint[:12] in str(error.value)


def test_an_artifact_whose_ancestor_changed_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", "step2_y", inputs=[open_artifact(tmp_path / "a", "step1_x.py")])
    make(tmp_path / "c", "step3_z", inputs=[open_artifact(tmp_path / "b", "step2_y.py")])
    # Made again with the same content: nothing changed.
    make(tmp_path / "a", overwrite=True)
    open_artifact(tmp_path / "c", "step3_z.py")
    make(tmp_path / "a", content="other", overwrite=True)
    with pytest.raises(ArtifactError, match=r"b was made from step1_x .* is now .*step2_y\.py"):
        open_artifact(tmp_path / "c", "step3_z.py")


def test_inputs_made_with_different_tokenizers_do_not_meet() -> None:
    model = Input("step3", "1" * 64, lineage={"tokenizer": "a" * 64})
    data = Input("step4", "2" * 64, lineage={"tokenizer": "b" * 64})
    with pytest.raises(
        ArtifactError, match="step3 was made with tokenizer aaaaaaaaaaaa, but step4"
    ):
        merge_lineage([model, data])


def test_a_moved_artifact_tree_stays_valid(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    make(tmp_path / "old" / "a")
    make(
        tmp_path / "old" / "b", "step2_y",
        inputs=[open_artifact(tmp_path / "old" / "a", "step1_x.py")],
    )  # fmt: skip
    (tmp_path / "old").rename(tmp_path / "new")
    open_artifact(tmp_path / "new" / "b", "step2_y.py")


def test_data_sets_by_name_have_no_files_to_fingerprint(tmp_path: Path) -> None:
    named = open_files("corpus")
    make(tmp_path / "a", inputs=[named])
    assert not make(tmp_path / "a", inputs=[named])
    open_artifact(tmp_path / "a", "step1_x.py")


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    output = Output(Config(output_dir=tmp_path / "a"), "step1_x", [])
    with pytest.raises(RuntimeError), output.write() as folder:
        (folder / "half.txt").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_overwrite_does_not_reach_beyond_the_step(tmp_path: Path) -> None:
    make(tmp_path / "a")
    source = open_artifact(tmp_path / "a", "step1_x.py")
    with pytest.raises(ArtifactError, match="is the output of step1_x, not step2_y"):
        make(tmp_path / "a", "step2_y", overwrite=True)
    for output in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ArtifactError, match="lies in the input"):
            make(output, "step2_y", inputs=[source], overwrite=True)
    open_artifact(tmp_path / "a", "step1_x.py")


def test_two_processes_do_not_write_the_same_artifact(tmp_path: Path) -> None:
    first, second = (Output(Config(output_dir=tmp_path / "a"), "step1_x", []) for _ in range(2))
    with first.write() as folder:
        (folder / "data.txt").write_text("first")
        with pytest.raises(ArtifactError, match="another process is writing"), second.write():
            pass
    assert (tmp_path / "a" / "data.txt").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_result_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    slow = Output(Config(output_dir=tmp_path / "a", size=1), "step1_x", [])
    assert slow.prepare()
    make(tmp_path / "a", size=2)
    with pytest.raises(ArtifactError, match="another process has published"), slow.write():
        pass
    manifest = read_manifest(tmp_path / "a")
    assert manifest and manifest.arguments == {"size": 2}
    assert make(tmp_path / "a", overwrite=True, size=1)


def test_a_file_is_known_by_its_folder_if_a_step_made_it(tmp_path: Path) -> None:
    make(tmp_path / "a")
    assert open_artifact_or_file(tmp_path / "a" / "data.txt", "step1_x.py").path == tmp_path / "a"
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "data.txt").write_text("content")
    (tmp_path / "app" / "manifest.json").write_text('{"name": "somebody else\'s"}')
    opened = open_artifact_or_file(tmp_path / "app" / "data.txt", "step1_x.py")
    assert (opened.role, opened.path) == ("step1_x", None)
    with pytest.raises(ArtifactError, match=r"none\.txt not found: expected a file, or the output"):
        open_artifact_or_file(tmp_path / "none.txt", "step1_x.py")


def test_large_files_are_compared_by_size_unless_every_byte_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")
    monkeypatch.setattr(files, "HASHED_BYTES", 6)
    (tmp_path / "a" / "data.txt").write_text("contend")
    open_artifact(tmp_path / "a", "step1_x.py")
    assert not Output(Config(output_dir=tmp_path / "a"), "step1_x", []).prepare()
    for refusing in (
        lambda: open_artifact(tmp_path / "a", "step1_x.py", every_byte=True),
        Output(Config(output_dir=tmp_path / "a", verify=True), "step1_x", []).prepare,
    ):
        with pytest.raises(ArtifactError, match="SHA-256"):
            refusing()


def test_a_check_says_what_it_has_not_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("x")
    sources = [Source("ja", str(tmp_path / "a.txt")), Source("ja", "somebody/data-set")]
    config = Config(output_dir=tmp_path / "out", check=True)
    with caplog.at_level("INFO"):
        assert not Output(config, "step1_x", [open_sources("texts", sources)]).prepare()
        assert "can be made (not checked: somebody/data-set, data sets on the hub)" in caplog.text
        caplog.clear()
        assert not Output(config, "step1_x", [open_sources("texts", sources[:1])]).prepare()
        assert caplog.text.rstrip().endswith("can be made")


def test_unfinished_work_is_kept_until_the_result_is_published(tmp_path: Path) -> None:
    output = Output(Config(output_dir=tmp_path / "a"), "step1_x", [], unfinished="work")
    assert output.unfinished == tmp_path / "a.work"
    output.unfinished.mkdir()
    with pytest.raises(RuntimeError), output.write():
        raise RuntimeError
    assert output.unfinished.exists()
    with output.write():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    # A kill between publishing and removing leaves it to the next run.
    published = (tmp_path / "a" / "manifest.json").stat().st_mtime
    output.unfinished.mkdir()
    (output.unfinished / "x").touch()
    for path in (output.unfinished / "x", output.unfinished):
        os.utime(path, (published, published - 1))
    assert not Output(
        Config(output_dir=tmp_path / "a", check=True), "step1_x", [], "work"
    ).prepare()
    assert output.unfinished.exists()
    assert not output.prepare()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_what_a_kill_leaves_of_the_removal_is_removed(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / ".a.removed" / "chunks").mkdir(parents=True)
    (tmp_path / ".a.lock").touch()
    output = Output(Config(output_dir=tmp_path / "a"), "step1_x", [], unfinished="work")
    assert not output.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_work_of_a_run_that_overwrites_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    """Killed after hours, and asked for again without --overwrite."""
    make(tmp_path / "a")
    overwriting = Output(Config(output_dir=tmp_path / "a", overwrite=True), "step1_x", [], "work")
    assert overwriting.prepare()
    with pytest.raises(KeyboardInterrupt), overwriting.write():
        overwriting.unfinished.mkdir()
        (overwriting.unfinished / "hours").touch()
        raise KeyboardInterrupt
    assert not Output(Config(output_dir=tmp_path / "a"), "step1_x", [], "work").prepare()
    assert (overwriting.unfinished / "hours").exists()


def test_an_output_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")
    for content in ("one", "two"):
        assert make(tmp_path / "a", content=content, overwrite=True)
        assert (tmp_path / "a").is_symlink()
        assert (tmp_path / "disk" / "a" / "data.txt").read_text() == content
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["a"]


def test_a_swap_of_another_process_is_left_alone(tmp_path: Path) -> None:
    """Between its two renames there is no result, but the former one beside."""
    make(tmp_path / "a")
    first = Output(Config(output_dir=tmp_path / "a", overwrite=True), "step1_x", [])
    assert first.prepare()
    with first.write() as folder:
        (folder / "data.txt").write_text("new")
        (tmp_path / "a").rename(tmp_path / ".a.old")
        with pytest.raises(ArtifactError, match="another process is writing"):
            make(tmp_path / "a")
        (tmp_path / ".a.old").rename(tmp_path / "a")
    assert (tmp_path / "a" / "data.txt").read_text() == "new"


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "data.txt").unlink()
    (tmp_path / "a" / "data.txt").symlink_to("data.txt")
    with pytest.raises(ArtifactError, match="cannot be reached"):
        open_artifact(tmp_path / "a", "step1_x.py")


def test_a_number_of_a_manifest_is_one(tmp_path: Path) -> None:
    make(tmp_path / "a", size=3)
    opened = open_artifact(tmp_path / "a", "step1_x.py")
    assert opened.read_number("arguments", "size") == 3
    with pytest.raises(ArtifactError, match="is damaged: counts has no number pieces"):
        opened.read_number("counts", "pieces")


def test_room_on_the_disk_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there of an unfinished run need not be written again."""
    monkeypatch.setattr(disk, "free_bytes", lambda _: 3_000_000)
    monkeypatch.setattr(Config, "disk_bytes", lambda _: 3_000_000)
    output = Output(Config(output_dir=tmp_path / "a"), "step1_x", [])
    assert output.prepare()
    monkeypatch.setattr(Config, "disk_bytes", lambda _: 3_000_100)
    with pytest.raises(ArtifactError) as refused:
        output.prepare()
    assert str(refused.value) == (
        f"{tmp_path}/a takes about 3.0 MB, but its disk has 3.0 MB free: free some, or choose "
        "another --output-dir"
    )
    output.unfinished.mkdir()
    (output.unfinished / "x").write_bytes(bytes(100))
    assert output.prepare()


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"data.txt": 7}},
        {"files": {"data.txt": {"bytes": "7", "sha256": ""}}},
        {"inputs": []},
        {"inputs": {"x": {"path": 5, "fingerprint": ""}}},
        {"lineage": {"x": None}},
        {"step": None},
    ],
)
def test_a_manifest_of_other_types_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    make(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        open_artifact(tmp_path / "a", "step1_x.py")


def test_foreign_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="no step made it"):
        make(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "mine"
    (tmp_path / "b").write_text("a file")
    with pytest.raises(ArtifactError, match="b exists and no step made it"):
        make(tmp_path / "b")


def test_published_files_have_the_mode_that_the_umask_allows(tmp_path: Path) -> None:
    output = Output(Config(output_dir=tmp_path / "a"), "step1_x", [])
    assert output.prepare()
    umask = os.umask(0o027)
    try:
        with output.write() as folder:
            save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "manifest.json", "settings.yaml"), 0o640)


def failing(code: int, only: Callable[[Any], bool] = lambda _: True) -> Callable[..., Any]:
    """A patch of a call that fails where its first argument is one that `only` accepts."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def patched(first: Any, *rest: Any, **named: Any) -> Any:
            if only(first):
                raise OSError(code, os.strerror(code), str(first))
            return call(first, *rest, **named)

        return patched

    return wrap


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize(
    ("place", "name", "code", "only", "said"),
    [
        *((fcntl, "flock", code, None, f"no file locks ({os.strerror(code)}): make sure that no "
           "other process writes beside {tmp}/.a.lock")
          for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)),
        *((os, "fsync", code, is_folder, "no fsync")
          for code in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.EACCES)),
        (Path, "chmod", errno.EPERM, None, "no file modes (Operation not permitted): others"),
        (Path, "chmod", errno.ENOSYS, None, "no file modes (Function not implemented): others"),
    ],
)  # fmt: skip
def test_what_a_file_system_lacks_is_a_warning(
    place: Any, name: str, code: int, only: Any, said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    files._warn_once.cache_clear()
    patch = failing(code, only) if only else failing(code)
    monkeypatch.setattr(place, name, patch(getattr(place, name)))
    output = Output(Config(output_dir=tmp_path / "a"), "step1_x", [])
    assert output.prepare()
    with output.write() as folder:
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    open_artifact(tmp_path / "a", "step1_x.py", every_byte=True)
    assert caplog.text.count("the file system has ") == 1
    assert said.format(tmp=tmp_path) in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failing_disk_is_not_a_missing_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO)(os.fsync))
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_result_that_cannot_be_renamed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on overlayfs, where a folder of the image cannot be."""
    make(tmp_path / "a", content="old")
    is_old = tmp_path.joinpath("a").__eq__
    monkeypatch.setattr(Path, "rename", failing(errno.EXDEV, is_old)(Path.rename))
    assert make(tmp_path / "a", content="new", overwrite=True)
    assert (tmp_path / "a" / "data.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("output_dir", "message"),
    [
        (".", "--output-dir . holds the current folder.*such as step1_x"),
        ("", "--output-dir . holds the current folder"),
        ("..", "--output-dir .. holds the current folder"),
        ("/", "--output-dir / holds the current folder.*such as /step1_x"),
        ("link", "--output-dir link holds the current folder"),
        ("~/out", "--output-dir ~/out: the shell has not replaced the ~"),
        ("file/out", "file/out cannot be written: .*/file: Not a directory: choose another"),
        ("file/a/b", "file/a/b cannot be written: .*/file: Not a directory"),
        ("dangling/out", "out cannot be written: .*/dangling: No such file or directory"),
        ("loop", "loop cannot be written: .*loop: Too many levels of symbolic links: choose"),
        ("x" * 250, "cannot be written: .*: File name too long"),
        ("file", "file exists and no step made it"),
        ("/proc/self/out", "/proc/self/out cannot be written: /proc/self: .*choose another"),
        ("mount", "mount is a mount point, which cannot be replaced.* --output-dir mount/step1_x"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line_at_the_start(
    output_dir: str, message: str, check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("file").touch()
    Path("mount").mkdir()
    Path("link").symlink_to(tmp_path)
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == "mount" or ismount(path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=message):
        Output(Config(output_dir=Path(output_dir), check=check), "step1_x", []).prepare()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_without_permission_is_one_line_at_the_start(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the system's answer is given here."""
    mkdir = failing(code, lambda path: Path(path).parent == tmp_path)(os.mkdir)
    monkeypatch.setattr(os, "mkdir", mkdir)
    for check in (True, False):
        output = Output(Config(output_dir=tmp_path / "a" / "b", check=check), "step1_x", [])
        with pytest.raises(ArtifactError) as refused:
            output.prepare()
        assert str(refused.value) == (
            f"{tmp_path}/a/b cannot be written: {tmp_path}: {os.strerror(code)}: choose another "
            "--output-dir"
        )


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    assert not Output(Config(output_dir=tmp_path / "a" / "b", check=True), "step1_x", []).prepare()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["nowhere", "x"])
def test_an_input_that_is_a_link_to_nothing_says_so(target: str, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(target)
    with pytest.raises(ArtifactError, match=f"x is a link to {target}, which does not exist"):
        open_files("corpus", tmp_path / "x")


KILLED = """
import os, signal, sys
from pathlib import Path
from chatglm_ja.storage.output import Output
from chatglm_ja.settings import StepConfig
path = Path(sys.argv[1])
output = Output(StepConfig(output_dir=path, overwrite=True), "step1_x", [])
moment = sys.argv[2]
rename = Path.rename
def rename_and_die(self, target):
    if moment == "before rename":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
output.prepare()
with output.write() as folder:
    (folder / "data.txt").write_text("new")
    if moment == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = rename_and_die
"""


@pytest.mark.parametrize("moment", ["writing", "before rename", "between renames"])
def test_a_kill_leaves_the_old_result_or_none(tmp_path: Path, moment: str) -> None:
    for earlier in (False, True):
        path = tmp_path / f"a{earlier}"
        if earlier:
            make(path, content="old")
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), moment],
            check=False,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        assert killed.returncode == -signal.SIGKILL
        if earlier:
            # The next run finds the former result, or puts it back.
            assert not make(path)
            assert (path / "data.txt").read_text() == "old"
        elif moment == "between renames":
            # There was nothing to move away, so the kill came after the publication.
            assert (path / "data.txt").read_text() == "new"
        else:
            with pytest.raises(ArtifactError, match="not found"):
                open_artifact(path, "step1_x.py")
            assert make(path)


def test_names_that_are_no_utf_8_are_refused_for_outputs_and_written_in_json(
    tmp_path: Path,
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe3\x81\x82"))
    with pytest.raises(ArtifactError, match="is not valid UTF-8, in which model files cannot"):
        make(odd / "result")
    files.write_json(tmp_path / "a.json", {"path": odd.name, "text": "あ"})
    content = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(content) == {"path": odd.name, "text": "あ"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz", "tokenizer.model"])
def test_what_git_clones_in_place_of_a_large_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ArtifactError, match=f"{name} is a Git LFS pointer.*`git lfs pull` in"):
        open_files("texts", path)
    if file_format(path):
        with pytest.raises(ArtifactError, match="git lfs pull"):
            open_sources("texts", [Source("ja", str(tmp_path))])
