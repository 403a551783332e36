"""Work in progress: found again where it is still good, and gone when it is not."""

import json
from pathlib import Path

import pytest

from chatglm_ja.data import resume
from chatglm_ja.data.index import Index
from chatglm_ja.data.readers import Reject
from chatglm_ja.data.units import Finished, Unit
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source


def folders(root: Path, **contents: list[dict[str, str]]) -> dict[str, list[Path]]:
    with resume.open_folders(root, **contents) as found:
        return found


def test_work_is_kept_by_what_shapes_it(tmp_path: Path) -> None:
    root = tmp_path / "work"
    first = folders(root, texts=[{"a": "1"}, {"b": "1"}], shards=[{"seed": "0"}])
    for path in (*first["texts"], *first["shards"]):
        (path / "unit").touch()
    # Another seed, and another source before the two: their texts are still good.
    again = folders(root, texts=[{"c": "1"}, {"a": "1"}, {"b": "1"}], shards=[{"seed": "1"}])
    assert again["texts"][1:] == first["texts"]
    assert [(path / "unit").exists() for path in again["texts"]] == [False, True, True]
    assert not first["shards"][0].exists()
    assert len(list(root.iterdir())) == 4


def test_a_source_given_twice_has_two_folders(tmp_path: Path) -> None:
    found = folders(tmp_path / "work", texts=[{"a": "1"}, {"a": "1"}])
    assert len(set(found["texts"])) == 2


def test_what_was_being_removed_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "work"
    (path,) = folders(root, texts=[{"a": "1"}])["texts"]
    (path / "000000.json").touch()
    monkeypatch.setattr(resume.shutil, "rmtree", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folders(root, texts=[{"a": "2"}])
    monkeypatch.undo()
    assert not list(folders(root, texts=[{"a": "1"}])["texts"][0].iterdir())
    assert len(list(root.iterdir())) == 1


def test_an_exception_keeps_the_work_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    root = tmp_path / "work"
    with (
        pytest.raises(KeyboardInterrupt),
        resume.open_folders(root, texts=[{}]) as found,
    ):
        (found["texts"][0] / "done").touch()
        (found["texts"][0] / "half.part").touch()
        raise KeyboardInterrupt
    assert [path.name for path in found["texts"][0].iterdir()] == ["done"]
    assert f"is kept in {root} for the next run" in caplog.text


def index_of(tmp_path: Path, *units: Unit) -> Index:
    sources = [Source("ja", f"{number}/same.jsonl") for number in range(len(units))]
    finished = [
        Finished(tmp_path / str(n), n, unit.write(tmp_path / str(n)))
        for n, unit in enumerate(units)
    ]
    return Index(sources, finished)


def test_sources_of_one_name_are_counted_apart(tmp_path: Path) -> None:
    bad = [(1, Reject("broken JSON", "x" * 9999)), (2, Reject("wrong type", "\ud800"))]
    index = index_of(
        tmp_path, Unit("same.jsonl", found=8, rejects=bad), Unit("same.jsonl", found=9)
    )
    rejects = resume.RejectsFile(tmp_path / "rejects.jsonl", tmp_path / "report", 0.1)
    with pytest.raises(
        DataError, match=r"ja/same: 2 of 10 records \(broken JSON 1, wrong type 1\)"
    ):
        rejects.check(index)
    lines = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert [len(line["detail"]) for line in lines] == [200, 1]


def test_a_source_without_records_and_a_lost_file_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = Unit("a.gz", found=999, rejects=[(1000, Reject("damaged gzip", "the rest is lost"))])
    rejects = resume.RejectsFile(tmp_path / "rejects.jsonl", tmp_path / "report", 0.01)
    rejects.check(index_of(tmp_path, lost))
    assert "ja/same: a.gz, damaged gzip: the rest is lost" in caplog.text
    with pytest.raises(DataError, match=r"source ja/same \(ja=1/same.jsonl\) holds no record"):
        rejects.check(index_of(tmp_path, lost, Unit("b")))
