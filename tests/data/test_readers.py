"""Reading records: every format, chunks of any size, and no bad record lost."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from chatglm_ja.data import corpus, readers
from chatglm_ja.data.readers import Reject
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source


def write(path: Path, content: str | bytes) -> Source:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Source("ja", str(path))


def read(source: Source, chunk_bytes: int = readers.CHUNK_BYTES) -> list[tuple[int, Any]]:
    return [
        pair
        for chunk in readers.read_chunks(source, chunk_bytes)
        for pair in readers.read_records(chunk, source)
    ]


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    texts = ["一つ目", "二つ目\u2028の文書"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    a_list = json.dumps([{"text": text} for text in texts])
    sources = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "b.jsonl", "\ufeff" + lines),
        write(tmp_path / "c.jsonl", lines.rstrip("\n").replace("\n", "\r\n")),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "a.txt", "\n".join(texts)),
        write(tmp_path / "b.txt", "\r\n".join(texts) + "\r\n"),
        write(tmp_path / "a.json", a_list),
        write(tmp_path / "a.json.gz", gzip.compress(a_list.encode())),
    ]  # fmt: skip
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    sources.append(Source("ja", str(tmp_path / "a.parquet")))
    for source in sources:
        assert read(source) == [(i, {"text": t}) for i, t in enumerate(texts, 1)], source.path


@pytest.mark.parametrize("chunk_bytes", [1, 3, 7, 50, 10_000])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_chunks_cut_no_record(tmp_path: Path, chunk_bytes: int, suffix: str) -> None:
    lines = ["a", "", "bcd", "ef\u2028gh", "あいうえお", "x" * 40, "last"]
    content = "\n".join(lines).encode()
    path = tmp_path / f"a.txt{suffix}"
    source = write(path, gzip.compress(content) if suffix else content)
    assert read(source, chunk_bytes) == [(i, {"text": t}) for i, t in enumerate(lines, 1)]


def test_a_data_set_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` accepts a folder as a name, which needs no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    texts = [f"文書 {i}" for i in range(100)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(Source, "is_local", lambda source: False)
    source = Source("ja", str(folder))
    assert len(list(readers.read_chunks(source, 200))) > 5
    assert [record["text"] for _, record in read(source, 200)] == texts
    with pytest.raises(DataError, match="neither a local file nor a data set that could be loaded"):
        read(Source("ja", "no-such/dataset"))


def test_a_condition_excludes_records(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n')
    filtered = Source("en", source.path, where=("label", "1"))
    assert read(filtered) == [(1, {"text": "x", "label": 1})]


GOOD = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", GOOD + b'{"text": \n' + GOOD, {2: "broken JSON"}),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n" + GOOD, {2: "broken JSON"}),
        ("a.jsonl", b"[1]\n5\nnull\n" + GOOD, {1: "wrong type", 2: "wrong type", 3: "wrong type"}),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n' + GOOD, {2: "invalid UTF-8"}),
        ("a.txt", "日本".encode("utf-16"), {1: "invalid UTF-8"}),
        ("a.jsonl.gz", b"plain", {1: "damaged gzip"}),
        ("a.json", '{"text": "x"}', {1: "broken file"}),
        ("a.json", '[{"text": "x"}, 5]', {2: "wrong type"}),
        ("a.json", b"\xff", {1: "broken file"}),
        ("a.json", "[", {1: "broken file"}),
        ("a.json.gz", b"plain", {1: "damaged gzip"}),
        ("a.parquet", b"plain", {1: "damaged parquet"}),
    ],
)
def test_bad_records_are_numbered_and_the_others_read(
    tmp_path: Path, name: str, content: str | bytes, expected: dict[int, str]
) -> None:
    source = write(tmp_path / name, content)
    for chunk_bytes in (5, 10_000):
        records = read(source, chunk_bytes)
        bad = {number: item.reason for number, item in records if isinstance(item, Reject)}
        assert bad == expected
        assert [number for number, _ in records] == list(range(1, len(records) + 1))
    with pytest.raises(
        DataError, match=f"{name} record {min(expected)}: {min(expected.items())[1]}"
    ):
        list(corpus.read_texts(source))


def test_a_truncated_gzip_file_gives_what_it_holds(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": f"{i:x}" * 50}).encode() + b"\n" for i in range(2000))
    compressed = gzip.compress(lines)
    records = read(write(tmp_path / "a.jsonl.gz", compressed[: len(compressed) // 2]), 4096)
    assert len(records) > 500
    assert all(isinstance(item, dict) for _, item in records[:-1])
    number, reject = records[-1]
    assert reject.reason == "damaged gzip"
    assert number == len(records)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_an_endless_line_is_skipped_and_never_held(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 1000)
    content = GOOD + b"x" * 50_000 + b"\n" + GOOD + b"y" * 50_000
    source = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    sizes = [
        len(chunk.payload)
        for chunk in readers.read_chunks(source, 100)
        if isinstance(chunk.payload, bytes)
    ]
    assert max(sizes) < 300
    records = read(source, 100)
    assert [number for number, _ in records] == [1, 2, 3, 4]
    assert [isinstance(item, Reject) for _, item in records] == [False, True, False, True]
    assert records[1][1].reason == records[3][1].reason == "endless line"


def test_a_damaged_row_group_loses_only_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"{i}" * 1000 for i in range(40)]}), path, row_group_size=10,
        compression="none", use_dictionary=False,
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    place = content.index(b"15" * 500) - 12_000
    content[place : place + 8000] = bytes(8000)
    path.write_bytes(content)
    records = [item for _, item in read(Source("ja", str(path)))]
    bad = [item for item in records if isinstance(item, Reject)]
    assert bad and all(item.reason == "damaged parquet" for item in bad)
    assert len(records) - len(bad) >= 20


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"body": "x"}, "missing column"),
        ({"text": 5}, "wrong type"),
        ({"text": None}, "wrong type"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"text": "a\0b"}, "NUL"),
        ({"text": ""}, None),
        ({"text": "𠮷\ufffd"}, None),
    ],
)
def test_bad_texts(record: dict[str, Any], reason: str | None) -> None:
    reject = readers.check_text(record.get("text"), "text", record)
    assert (reject and reject.reason) == reason


def test_values_that_python_cannot_hold_are_none(tmp_path: Path) -> None:
    days = pyarrow.array([1, 2**31 - 1, 3], pyarrow.int32()).view(pyarrow.date32())
    raw = pyarrow.array([b"ab", b"\xff\xfe", b"cd"]).view(pyarrow.string())
    table = pyarrow.table({"text": ["x", "y", "z"], "day": days, "raw": raw})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    records = [record for _, record in read(Source("ja", str(tmp_path / "a.parquet")))]
    assert [record["text"] for record in records] == ["x", "y", "z"]
    assert [record["raw"] for record in records] == ["ab", None, "cd"]


def test_row_groups_are_cut_into_chunks(tmp_path: Path) -> None:
    texts = [f"{i}" * 100 for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    source = Source("ja", str(tmp_path / "a.parquet"))
    assert len(list(readers.read_chunks(source, 20_000))) == readers.MAX_PARTS
    assert [(n, r["text"]) for n, r in read(source, 20_000)] == list(enumerate(texts, 1))


def test_a_condition_on_a_missing_column_rejects_the_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n').path
    ((_, reject),) = read(Source("ja", path, where=("kind", "a")))
    assert reject.reason == "missing column"


def test_a_missing_file_is_an_error_not_a_bad_record(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    source = Source("ja", str(tmp_path / "a.parquet"))
    (chunk,) = readers.read_chunks(source)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        list(readers.read_records(chunk, source))
