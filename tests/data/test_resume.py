"""Work in progress: found again if it is still valid, removed if not."""

import errno
import json
import os
from pathlib import Path

import pytest

from chatglm_ja.data import resume
from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.readers import Reject
from chatglm_ja.data.token_store import TokenizedChunk
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source
from chatglm_ja.storage import files


def folders(root: Path, **contents: list[dict[str, str]]) -> dict[str, list[Path]]:
    with resume.open_folders(root, **contents) as paths:
        return paths


def test_folders_are_kept_while_their_content_is_valid(tmp_path: Path) -> None:
    root = tmp_path / "work"
    first = folders(root, texts=[{"a": "1"}, {"b": "1"}], shards=[{"seed": "0"}])
    for path in (*first["texts"], *first["shards"]):
        (path / "chunk").touch()
    # With another seed and another source before the two, their texts are still valid.
    again = folders(root, texts=[{"c": "1"}, {"a": "1"}, {"b": "1"}], shards=[{"seed": "1"}])
    assert again["texts"][1:] == first["texts"]
    assert [(path / "chunk").exists() for path in again["texts"]] == [False, True, True]
    assert not first["shards"][0].exists()
    assert len(list(root.iterdir())) == 4


def test_work_of_another_format_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "work"
    monkeypatch.setattr(resume, "FORMAT", resume.FORMAT - 1)
    (old,) = folders(root, texts=[{"a": "1"}])["texts"]
    (old / "000000.hashes").touch()
    monkeypatch.undo()
    (new,) = folders(root, texts=[{"a": "1"}])["texts"]
    assert list(root.iterdir()) == [new] and not list(new.iterdir())


def test_a_source_listed_twice_has_two_folders(tmp_path: Path) -> None:
    paths = folders(tmp_path / "work", texts=[{"a": "1"}, {"a": "1"}])
    assert len(set(paths["texts"])) == 2


def test_a_half_removed_folder_is_not_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "work"
    (path,) = folders(root, texts=[{"a": "1"}])["texts"]
    (path / "000000.json").touch()
    monkeypatch.setattr(resume.shutil, "rmtree", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folders(root, texts=[{"a": "2"}])
    monkeypatch.undo()
    assert not list(folders(root, texts=[{"a": "1"}])["texts"][0].iterdir())
    assert len(list(root.iterdir())) == 1


def test_finished_work_survives_an_exception_and_half_written_files_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    root = tmp_path / "work"
    with (
        pytest.raises(KeyboardInterrupt),
        resume.open_folders(root, texts=[{}]) as paths,
    ):
        (paths["texts"][0] / "done").touch()
        (paths["texts"][0] / "half.part").touch()
        raise KeyboardInterrupt
    assert f"finished work is kept in {root}: re-run the command" in caplog.text
    assert [path.name for path in folders(root, texts=[{}])["texts"][0].iterdir()] == ["done"]


@pytest.mark.parametrize(
    "code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV]
)
def test_shards_are_copied_where_they_cannot_be_linked(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    for name in ("work", "linked", "copied"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "a.arrow").write_text("shard")
    (tmp_path / "work" / "b.txt").write_text("report")
    resume.link_files(tmp_path / "work", tmp_path / "linked")
    files._warn_once.cache_clear()
    monkeypatch.setattr(os, "link", no_link)
    resume.link_files(tmp_path / "work", tmp_path / "copied")
    assert (
        f"has no hard links ({os.strerror(code)}): the files of {tmp_path}/copied are copied"
        in (caplog.text)
    )
    for name, links in (("linked", 2), ("copied", 1)):
        shard, report = sorted((tmp_path / name).iterdir())
        assert (shard.read_text(), report.read_text()) == ("shard", "report")
        assert shard.stat().st_nlink == links


def make_index(tmp_path: Path, *chunks: TokenizedChunk) -> DocumentIndex:
    sources = [Source("ja", f"{number}/same.jsonl") for number in range(len(chunks))]
    stored = [chunk.write(tmp_path / str(n), n) for n, chunk in enumerate(chunks)]
    return DocumentIndex(sources, stored)


def test_sources_of_equal_name_are_counted_separately(tmp_path: Path) -> None:
    bad = [(1, Reject("broken JSON", "x" * 9999)), (2, Reject("wrong type", "\ud800"))]
    index = make_index(
        tmp_path,
        TokenizedChunk("same.jsonl", found=8, rejects=bad),
        TokenizedChunk("same.jsonl", found=9),
    )
    rejects = resume.RejectsFile(tmp_path / "rejects.jsonl", tmp_path / "report", 0.1)
    with pytest.raises(
        DataError, match=r"ja/same: 2 of 10 records \(broken JSON 1, wrong type 1\)"
    ):
        rejects.check(index)
    lines = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert [len(line["detail"]) for line in lines] == [200, 1]


def test_a_lost_file_is_logged_and_a_source_without_records_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reject = Reject("damaged gzip", "the rest is lost")
    lost = TokenizedChunk("a.gz", found=999, rejects=[(1000, reject)])
    rejects = resume.RejectsFile(tmp_path / "rejects.jsonl", tmp_path / "report", 0.01)
    rejects.check(make_index(tmp_path, lost))
    assert "ja/same: a.gz, damaged gzip: the rest is lost" in caplog.text
    with pytest.raises(DataError, match=r"source ja/same \(ja=1/same.jsonl\) holds no record"):
        rejects.check(make_index(tmp_path, lost, TokenizedChunk("b")))
