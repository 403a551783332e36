"""Reading whole sources: cleaned texts, bad records counted and named, too many refused."""

import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.data import corpus, rejects
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

DIRTY = "\ufeff\u200bがぎぐ\r\nはば\u200bぱ\x07\r\n"
CLEAN = "がぎぐ\nはばぱ"


def write_rows(path: Path, *rows: Any) -> Source:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Source("ja", str(path))


def decompose(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def test_texts_are_cleaned(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"text": decompose(DIRTY)}, {"text": " \u200b"})
    assert list(SourceReader().texts(source)) == [CLEAN]


def test_bad_records_are_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"text": str(i)} for i in range(198)]
    endless = {"text": "x" * (corpus.MAX_LINE_CHARACTERS + 1)}
    source = write_rows(tmp_path / "a.jsonl", *good, {"text": None}, endless)
    reader = SourceReader()
    with caplog.at_level(logging.WARNING):
        assert list(reader.texts(source)) == [row["text"] for row in good]
    assert reader.rejected == 2
    (line,) = caplog.messages
    assert "passed over ja/a: 2 of 200 records (wrong type 1, endless line 1)" in line
    assert "a.jsonl record 199: wrong type, column 'text' holds NoneType" in line
    source = write_rows(tmp_path / "b.jsonl", *good, "{", "{", "{")
    with pytest.raises(DataError, match=r"more than 1\.00% .* ja/b: 3 of 201 .*broken JSON 3.*"
                       r"record 199: broken JSON.* raise --max-rejects"):  # fmt: skip
        list(SourceReader().texts(source))


def test_a_reader_that_stops_early_checks_what_it_read(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", "{", *[{"text": str(i)} for i in range(300)])
    reader = SourceReader()
    texts = reader.texts(source)
    for _ in range(50):
        next(texts)
    with pytest.raises(DataError, match="1 of 51 records"):
        reader.check()


def test_a_hopeless_source_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejects, "EARLY_RECORDS", 10)
    source = write_rows(tmp_path / "a.jsonl", *["{"] * 11, *[{"text": str(i)} for i in range(999)])
    with pytest.raises(DataError, match="10 of 10 records"):
        list(SourceReader().texts(source))


def test_a_source_without_records_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "x", "kind": "a"}).path
    with pytest.raises(DataError, match="holds no record where kind=b"):
        list(SourceReader().texts(Source("ja", path, where=("kind", "b"))))


def test_conversations_end_with_an_answer_and_bad_ones_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "a"}] * 150
    open_one = {"messages": [{"role": "user", "content": "open"}]}
    source = write_rows(tmp_path / "a.jsonl", *rows, open_one, {"prompt": "q", "response": ""})
    reader = SourceReader()
    assert len(list(reader.conversations(source))) == 150
    assert reader.rejected == 1


def test_texts_of_a_language_come_in_turn_from_its_sources(tmp_path: Path) -> None:
    sources = [write_rows(tmp_path / f"{name}.txt", f"{name}1", f"{name}2") for name in "ab"]
    by_language = SourceReader().texts_by_language(sources)
    assert list(by_language["ja"]) == ["a1", "b1", "a2", "b2"]
