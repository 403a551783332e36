"""Reading records: every format, chunks of any size, and no bad record lost."""

import bz2
import gzip
import json
import lzma
import pkgutil
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from chatglm_ja.data import readers
from chatglm_ja.data.file_start import ENCODINGS
from chatglm_ja.data.readers import FileRange, Reject
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.source_files import COMPRESSIONS, ZSTD
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


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": pkgutil.resolve_name(f"{ZSTD}:compress"),
}  # fmt: skip


def test_every_compression_is_tested() -> None:
    assert COMPRESS.keys() == {"", *COMPRESSIONS}


NOVEL = "第一章\n\n 吾輩は猫である。\n名前はまだ無い。\n\u3000\n\n\nどこで\r\n生れたか\r\n\r\n。\n"


@pytest.mark.parametrize("chunk_bytes", [1, 5, 30, 10_000])
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("paragraphs", {1: "第一章", 3: " 吾輩は猫である。\n名前はまだ無い。",
                        8: "どこで\r\n生れたか\r", 11: "。"}),
        ("document", {1: NOVEL}),
    ],
)  # fmt: skip
def test_paragraphs_and_whole_text_files(
    tmp_path: Path, chunk_bytes: int, form: str, expected: dict[int, str]
) -> None:
    source = Source("ja", write(tmp_path / "a.txt", NOVEL).path, format=form)  # type: ignore[arg-type]
    found = {number: record["text"].rstrip("\n") for number, record in read(source, chunk_bytes)}
    assert found == {number: text.rstrip("\n") for number, text in expected.items()}


def test_a_bad_byte_costs_its_paragraph_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "一\n\n二".encode() + b"\xff\nx\n\n" + "三".encode()).path
    for chunk_bytes in (4, 1000):
        first, bad, last = read(Source("ja", path, format="paragraphs"), chunk_bytes)
        assert (first, last) == ((1, {"text": "一"}), (6, {"text": "三"}))
        assert bad == (3, Reject("invalid UTF-8", "byte 0xff at 1"))


def test_a_text_that_is_too_long_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 50)
    content = "a\n\n" + "line\n" * 30 + "\nlast\n"
    path = write(tmp_path / "a.txt", content).path
    found = read(Source("ja", path, format="paragraphs"), 20)
    assert [(n, getattr(item, "reason", item)) for n, item in found] == [
        (1, {"text": "a"}), (3, "endless line"), (34, {"text": "last"}),
    ]  # fmt: skip
    ((number, reject),) = read(Source("ja", path, format="document"), 20)
    assert (number, reject.reason) == (1, "endless line")


def test_arrow_files_of_both_formats(tmp_path: Path) -> None:
    texts = [f"{i}" * 100 for i in range(300)]
    table = pyarrow.table({"text": texts})
    for kind, new in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        path = tmp_path / f"{kind}.arrow"
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
        source = Source("ja", str(path))
        assert len(list(readers.read_chunks(source, 5000))) > 3
        assert [(n, r["text"]) for n, r in read(source, 5000)] == list(enumerate(texts, 1))
        path.write_bytes(path.read_bytes()[:-400])
        ((number, reject),) = read(source)
        assert (number, reject.reason) == (1, "damaged arrow")


JAPANESE = "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n" * 3
CHINESE = "今天天气很好，我们一起去公园散步吧。\n中文和英文的分词不会改变。\n" * 3


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        (JAPANESE, "cp932", "CP932"), (JAPANESE, "euc_jp", "EUC-JP"),
        (JAPANESE, "iso2022_jp", "ISO-2022-JP"), (JAPANESE, "utf-16", "UTF-16"),
        (JAPANESE, "utf-16-le", "UTF-16LE"), (CHINESE, "gb18030", "GB18030"),
        (CHINESE, "big5", "BIG5"), ("plain English text\n" * 9, "utf-16-be", "UTF-16BE"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".txt.gz"])
def test_other_encodings_are_named(
    tmp_path: Path, text: str, encoding: str, name: str, ending: str
) -> None:
    rows = [json.dumps({"text": line}, ensure_ascii=False) for line in text.splitlines()]
    whole = {".jsonl": "\n".join(rows), ".json": f"[{','.join(rows)}]"}.get(ending, text)
    content = whole.encode(encoding, errors="ignore")
    source = write(tmp_path / f"a{ending}", COMPRESS[Path(ending).suffix](content)
                   if ending.endswith(".gz") else content)  # fmt: skip
    with pytest.raises(DataError, match=rf"looks like {name}, expected UTF-8: .*iconv -f {name} "):
        read(source)


def test_of_a_short_text_an_encoding_of_its_language_is_named(tmp_path: Path) -> None:
    for language, text, encoding in (
        ("ja", "猫。", "cp932"),
        ("ja", "日本の猫", "euc_jp"),
        ("zh", "今天天气很好。", "gb18030"),
        ("ko", "고양이", "cp949"),
    ):
        path = write(tmp_path / "a.txt", text.encode(encoding)).path
        with pytest.raises(DataError, match=f"looks like {ENCODINGS[encoding]}, expected UTF-8"):
            read(Source(language, path))


def test_files_that_were_joined_have_marks_inside(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD + "\ufeff".encode() + GOOD)
    assert [record for _, record in read(source)] == [{"text": "x"}] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([{"text": "x"}, {"text": "y"}], indent=1), "is one JSON list.* with .json"),
        (json.dumps([{"text": "x"}]), "is one JSON list"),
        (json.dumps({"text": "x"}, indent=2) * 3, "objects over several lines.*jq -c"),
    ],
)
def test_files_that_are_wrong_as_a_whole(tmp_path: Path, content: str, message: str) -> None:
    """They are refused before anything is read, also beside good ones."""
    with pytest.raises(DataError, match=message) as error:
        write(tmp_path / "a.jsonl", GOOD)
        write(tmp_path / "b.jsonl", content)
        next(readers.read_chunks(Source("ja", str(tmp_path))))
    assert str(tmp_path / "b.jsonl") in str(error.value)


@pytest.mark.parametrize("chunk_bytes", [1, 3, 7, 50, 10_000])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_chunks_cut_no_record(tmp_path: Path, chunk_bytes: int, suffix: str) -> None:
    lines = ["a", "", "bcd", "ef\u2028gh", "あいうえお", "x" * 40, "last"]
    content = "\n".join(lines).encode()
    # Two parts, as parallel compressors write them.
    parts = COMPRESS[suffix](content[:20]) + COMPRESS[suffix](content[20:])
    source = write(tmp_path / f"a.txt{suffix}", parts)
    assert read(source, chunk_bytes) == [(i, {"text": t}) for i, t in enumerate(lines, 1)]


@pytest.mark.parametrize("form", ["lines", "paragraphs", "document"])
def test_chunks_of_an_uncompressed_file_are_the_places_of_a_compressed_ones_bytes(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 300)
    content = "\ufeff".encode() + NOVEL.encode() * 3 + b"x" * 999 + b"\n\n" + NOVEL.encode()
    paths = [tmp_path / "a.txt", tmp_path / "a.txt.gz"]
    paths[0].write_bytes(content)
    paths[1].write_bytes(gzip.compress(content))
    for chunk_bytes in (3, 50, 10_000):
        plain, packed = (
            list(readers.read_chunks(Source("ja", str(path), format=form), chunk_bytes))  # type: ignore[arg-type]
            for path in paths
        )
        assert [chunk.first for chunk in plain] == [chunk.first for chunk in packed]
        read_back = [
            chunk.payload.read() if isinstance(chunk.payload, FileRange) else chunk.payload
            for chunk in plain
        ]
        assert read_back == [chunk.payload for chunk in packed]
        assert not any(isinstance(chunk.payload, bytes) for chunk in plain)


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD * 3)
    (chunk,) = readers.read_chunks(source)
    write(tmp_path / "a.jsonl", GOOD * 2)
    message = r"a.jsonl became shorter.*expected 42 bytes at 0, found 28; re-run"
    with pytest.raises(DataError, match=message):
        list(readers.read_records(chunk, source))


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
        ("a.txt", "一\n二\n".encode() + b"\x81\n", {3: "invalid UTF-8"}),
        ("a.jsonl.gz", b"plain", {1: "damaged gzip"}),
        ("a.json", '{"text": "x"}', {1: "broken file"}),
        ("a.json", '[{"text": "x"}, 5]', {2: "wrong type"}),
        ("a.json", b"\xff", {1: "broken file"}),
        ("a.json", "[", {1: "broken file"}),
        ("a.json", "", {1: "broken file"}),
        ("a.json", '[{"text": "x"}', {2: "broken file"}),
        ("a.json", '[{"text": "x"},', {2: "broken file"}),
        ("a.json", '[{"text": "x"} 5]', {2: "broken file"}),
        ("a.json", '[{"text": "x"},]', {2: "broken file"}),
        ("a.json", '[{"text": "x"}] 5', {2: "broken file"}),
        ("a.json", "5", {1: "broken file"}),
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
        list(SourceReader().texts(source))


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_truncated_file_gives_what_it_holds(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("0123456789abcdef", k=400)) for _ in range(5000)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    compressed = COMPRESS[suffix](lines)
    records = read(write(tmp_path / f"a.jsonl{suffix}", compressed[: len(compressed) // 2]), 4096)
    assert len(records) > 100
    assert all(isinstance(item, dict) for _, item in records[:-1])
    number, reject = records[-1]
    assert reject.reason == f"damaged {COMPRESSIONS[suffix].module}"
    assert reject.reason in readers.LOST_FILE
    assert number == len(records)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_an_endless_line_is_skipped_and_never_held(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 1000)
    content = GOOD + b"x" * 50_000 + b"\n" + GOOD + b"y" * 50_000
    source = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    payloads = [chunk.payload for chunk in readers.read_chunks(source, 100)]
    whole = [part for part in payloads if not isinstance(part, Reject)]
    sizes = [part.length if isinstance(part, FileRange) else len(part) for part in whole]  # type: ignore[arg-type]
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


def test_a_row_group_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i}" * 100 for i in range(3000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2000)
    source = Source("ja", str(path))
    decoded: list[int] = []
    iterate = pyarrow.parquet.ParquetFile.iter_batches

    def counted(*given: Any) -> Any:
        for batch in iterate(*given):
            decoded.append(len(batch))
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    chunks = list(readers.read_chunks(source, 50_000))
    path.unlink()
    assert sum(decoded) == 3000 and len(decoded) == len(chunks) > 10
    records = [record for chunk in chunks for record in readers.read_records(chunk, source)]
    assert [(n, r["text"]) for n, r in records if isinstance(r, dict)] == [*enumerate(texts, 1)]


def test_a_condition_on_a_missing_column_rejects_the_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n').path
    ((_, reject),) = read(Source("ja", path, where=("kind", "a")))
    assert reject.reason == "missing column"


def test_a_missing_file_is_an_error_not_a_bad_record(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", '[{"text": "x"}]')
    (chunk,) = readers.read_chunks(source)
    (tmp_path / "a.json").unlink()
    with pytest.raises(FileNotFoundError):
        list(readers.read_records(chunk, source))


def test_a_missing_split_of_a_data_set_by_name_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` accepts a folder as a name; the splits are those of the hub's data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train_sft", "test_sft"):
        write(folder / f"{split}.jsonl", GOOD)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: v1\n  data_files:\n"
        + "".join(f"  - {{split: {s}, path: {s}.jsonl}}\n" for s in ("train_sft", "test_sft"))
        + "---\n"
    )
    monkeypatch.setattr(Source, "is_local", lambda source: False)
    for subset, listed in ((None, "train_sft.*test_sft"), ("v2", "v1")):
        with pytest.raises(DataError, match=rf"does not have the split.*{listed}.*split=NAME"):
            read(Source("ja", str(folder), subset=subset))
    assert len(read(Source("ja", str(folder), split="test_sft"))) == 1


@pytest.mark.parametrize("size", [1, 2, 7, 100, 10_000])
def test_a_json_list_is_parsed_as_json_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Wherever the blocks end that are read of it."""
    values = [
        {"text": "あ\n\u2028𠮷\ud800", "n": [1.5, -3e9, True, None, {"a": []}]},
        {},
        {"text": "]},["},
        {"text": "x" * 300},
    ]
    monkeypatch.setattr(readers, "LIST_CHARACTERS", size)
    for text in (json.dumps(values), json.dumps(values, indent=1), "\ufeff[ ]\r\n", "[1,22,333]"):
        path = tmp_path / "a.json"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        with path.open(encoding="utf-8-sig", newline="") as file:
            assert list(readers._parse_values(file)) == json.loads(text.lstrip("\ufeff"))


def test_a_large_json_list_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LIST_CHARACTERS", 2**14)
    path = tmp_path / "a.json"
    row = json.dumps({"text": "文" * 2000}, ensure_ascii=False)
    path.write_text("[" + ",\n".join([row] * 5000) + "]", encoding="utf-8")
    tracemalloc.start()
    try:
        (chunk,) = readers.read_chunks(source := Source("ja", str(path)))
        assert sum(1 for _ in readers.read_records(chunk, source)) == 5000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 20
    finally:
        tracemalloc.stop()
