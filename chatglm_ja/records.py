"""Reading a source's records: in chunks that can be read apart, and without losing a bad one.

A source is cut into chunks of about `chunk_bytes`. Where the cuts fall depends on the data alone,
so that any number of processes sees the same chunks. A chunk is small to send to a process, and
`records` turns it into its records, each with its number (a line of a text file, a row of a
table) and either its columns or what is wrong with it:

    for chunk in chunks(source):
        for number, record in records(chunk, source):   # record: dict, or Reject

Nothing is read whole, a .json list excepted: a file without line breaks is skipped, not held.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

Record = dict[str, Any]
TEXT_COLUMN = "text"
CHUNK_BYTES = 2**23
# Longer than any book in one JSON line.
MAX_RECORD_BYTES = 2**26
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Reject:
    """A record that cannot be used: `reason` is one of few words, `detail` says what was found."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Chunk:
    """A run of records of one file or data set; `first` is the number of the first, from 1.

    The payload is whole lines as bytes, a group of a parquet file by its index, rows as an Arrow
    stream, a .json file's path, or the Reject that stands in the place of what could not be read.
    """

    file: str
    first: int
    payload: bytes | int | pyarrow.Buffer | Path | Reject


def read_records(source: Source) -> Iterator[Record]:
    """The records of a source; DataError with file and number for the first bad one."""
    for chunk in chunks(source):
        for number, record in records(chunk, source):
            if isinstance(record, Reject):
                raise rejected(chunk.file, number, record)
            yield record


def rejected(file: str, number: int, reject: Reject) -> DataError:
    return DataError(f"{file} record {number}: {reject.reason} ({reject.detail})")


def chunks(source: Source, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a source into chunks; DataError when it is not there at all."""
    files = source.files()
    for path in files:
        name = path.name.removesuffix(".gz")
        if name.endswith(".parquet"):
            yield from _parquet_chunks(path)
        elif name.endswith(".json"):
            yield Chunk(str(path), 1, path)
        elif name.endswith((".jsonl", ".txt")):
            yield from _line_chunks(path, chunk_bytes)
        else:
            raise DataError(f"{path}: expected a .txt, .jsonl, .json or .parquet file")
    if not files:
        yield from _dataset_chunks(source, chunk_bytes)


def records(chunk: Chunk, source: Source) -> Iterator[tuple[int, Record | Reject]]:
    """The numbered records of a chunk that satisfy the source's `where`."""
    for number, record in _all_records(chunk):
        if isinstance(record, Reject) or _is_wanted(record, source):
            yield number, record


def _is_wanted(record: Record, source: Source) -> bool:
    return source.where is None or str(record.get(source.where[0])) == source.where[1]


def check_text(value: Any, column: str, record: Record) -> Reject | None:
    """What is wrong with a text, if anything is."""
    if column not in record:
        return Reject("missing column", f"no column {column!r} among {', '.join(record)}")
    if not isinstance(value, str):
        return Reject("wrong type", f"column {column!r} holds {type(value).__name__}, not text")
    return check_characters(value)


def check_characters(text: str) -> Reject | None:
    """A lone surrogate (half of a UTF-16 pair, which JSON can spell) has no UTF-8 form and would
    crash sentencepiece; NUL is a sign of binary data."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at character {error.start}"
            return Reject("lone surrogate", found)
    if "\0" in text:
        return Reject("NUL", f"at character {text.index(chr(0))}")
    return None


def _all_records(chunk: Chunk) -> Iterator[tuple[int, Record | Reject]]:
    payload = chunk.payload
    if isinstance(payload, Reject):
        yield chunk.first, payload
    elif isinstance(payload, bytes):
        is_json = chunk.file.removesuffix(".gz").endswith(".jsonl")
        for number, line in enumerate(_decoded_lines(payload), chunk.first):
            if isinstance(line, Reject):
                yield number, line
            elif is_json and line and not line.isspace():
                yield number, _parse_object(line)
            elif not is_json:
                yield number, {TEXT_COLUMN: line.removesuffix("\r")}
    elif isinstance(payload, Path):
        yield from enumerate(_json_list(payload), chunk.first)
    elif isinstance(payload, int):
        batches = pyarrow.parquet.ParquetFile(chunk.file).iter_batches(
            batch_size=ROWS_AT_ONCE, row_groups=[payload]
        )
        yield from _rows(batches, chunk.first)
    else:
        yield from _rows(pyarrow.ipc.open_stream(payload), chunk.first)


def _rows(batches: Any, first: int) -> Iterator[tuple[int, Record | Reject]]:
    number = first
    try:
        for batch in batches:
            for record in batch.to_pylist():
                yield number, record
                number += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield number, Reject("damaged parquet", f"the rest of its rows is lost ({_first(error)})")


def _decoded_lines(payload: bytes) -> Iterator[str | Reject]:
    """The lines of a chunk; only where it is not UTF-8, each is decoded by itself."""
    try:
        lines: Any = payload.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = payload.split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line break is no line
    for line in lines:
        if isinstance(line, str):
            yield line
            continue
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Reject("invalid UTF-8", f"byte 0x{line[error.start]:02x} at {error.start}")


def _parse_object(line: str) -> Record | Reject:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Reject("broken JSON", str(error))
    if not isinstance(record, dict):
        return Reject("wrong type", f"a JSON {type(record).__name__}, expected an object")
    return record


def _json_list(path: Path) -> Iterator[Record | Reject]:
    try:
        opener: Any = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "rb") as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield Reject("invalid UTF-8", error.reason)
    except (ValueError, RecursionError) as error:
        yield Reject("broken JSON", str(error))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Reject("damaged gzip", str(error))
    else:
        if not isinstance(rows, list):
            yield Reject("wrong type", f"a JSON {type(rows).__name__}, expected a list of objects")
            return
        for row in rows:
            if isinstance(row, dict):
                yield row
            else:
                yield Reject("wrong type", f"a JSON {type(row).__name__}, expected an object")


def _line_chunks(path: Path, chunk_bytes: int) -> Iterator[Chunk]:
    chunk = partial(Chunk, str(path))
    rest, number, skipping = b"", 1, False
    for block in _blocks(path, chunk_bytes):
        if isinstance(block, Reject):
            # The line that was cut is lost with what follows it.
            yield chunk(number, block)
            return
        if number == 1 and not rest:
            block = block.removeprefix(b"\xef\xbb\xbf")
        if skipping:
            end = block.find(b"\n") + 1
            if not end:
                continue
            block, skipping, number = block[end:], False, number + 1
        rest += block
        cut = rest.rfind(b"\n") + 1
        if cut:
            whole, rest = rest[:cut], rest[cut:]
            yield chunk(number, whole)
            number += whole.count(b"\n")
        if len(rest) > MAX_RECORD_BYTES:
            size = f"longer than {MAX_RECORD_BYTES:,} bytes, expected one record a line"
            yield chunk(number, Reject("endless line", size))
            rest, skipping = b"", True
    if rest:
        yield chunk(number, rest)


def _blocks(path: Path, size: int) -> Iterator[bytes | Reject]:
    """A file, also gzipped, in blocks of `size` bytes; what comes before damage is kept."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    parts: list[bytes] = []
    held = 0
    with opener(path, "rb") as file:
        try:
            # read1 gives what is decoded already; read would lose it when damage follows.
            while part := file.read1(size - held):
                parts.append(part)
                held += len(part)
                if held == size:
                    yield b"".join(parts)
                    parts, held = [], 0
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            whole = b"".join(parts)
            yield whole[: whole.rfind(b"\n") + 1]
            yield Reject("damaged gzip", f"the rest of the file is lost ({_first(error)})")
            return
    if held:
        yield b"".join(parts)


def _parquet_chunks(path: Path) -> Iterator[Chunk]:
    try:
        metadata = pyarrow.parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield Chunk(str(path), 1, Reject("damaged parquet", f"the file is lost ({_first(error)})"))
        return
    first = 1
    for index in range(metadata.num_row_groups):
        yield Chunk(str(path), first, index)
        first += metadata.row_group(index).num_rows


def _dataset_chunks(source: Source, chunk_bytes: int) -> Iterator[Chunk]:
    """The train split of a data set, which `datasets` downloads once and maps into memory."""
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.subset, split="train")
    except Exception as error:  # the hub's errors have no common base
        raise DataError(
            f"source {source.title}: {source.path} is neither a file here nor a data set that "
            f"could be loaded ({_first(error)}): download it and give its path"
        ) from None
    table = rows.with_format("arrow")
    per_chunk = max(1, len(rows) * chunk_bytes // max(1, rows.data.nbytes))
    for start in range(0, len(rows), per_chunk):
        part = table[start : start + per_chunk]
        stream = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(stream, part.schema) as writer:
            writer.write_table(part, max_chunksize=ROWS_AT_ONCE)
        yield Chunk(source.path, start + 1, stream.getvalue())


def _first(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
