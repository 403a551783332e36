"""Reading a source's records: in chunks that can be read apart, and without losing a bad one.

A source is cut into chunks of about `chunk_bytes`. Where the cuts fall depends on the data alone,
so that any number of processes sees the same chunks. A chunk is small to send to a process, and
`records` turns it into its records, each with its number (a line of a text file, a row of a
table) and either its columns or what is wrong with it:

    for chunk in chunks(source):
        for number, record in records(chunk, source):   # record: dict, or Reject

Nothing is read whole but a .json list, and a parquet file is cut into sixteen parts of a group of
rows at most. A line without an end is skipped, not held.
"""

import gzip
import itertools
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
# Lists and objects in each other. Python's own limit depends on where it is reached.
MAX_DEPTH = 100
ROWS_AT_ONCE = 1000
# A group of rows is cut into so many chunks at most: each reads the group up to its end.
MAX_PARTS = 16
# Reasons that stand for all records of a file from there on.
LOST_FILE = ("damaged gzip", "damaged parquet", "broken file")


@dataclass(frozen=True)
class Reject:
    """A record that cannot be used: `reason` is one of few words, `detail` says what was found."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Chunk:
    """A run of records of one file or data set; `first` is the number of the first, from 1.

    The payload is whole lines as bytes, rows of a parquet file, rows as an Arrow stream, a .json
    file's path, or the Reject that stands in the place of what could not be read.
    """

    file: str
    first: int
    payload: "bytes | ParquetRows | pyarrow.Buffer | Path | Reject"


@dataclass(frozen=True)
class ParquetRows:
    """Rows start .. stop of a group of rows."""

    group: int
    start: int
    stop: int


def reject_error(file: str, number: int, reject: Reject) -> DataError:
    """The error of those who stop at a bad record."""
    return DataError(f"{file} record {number}: {reject.reason} ({reject.detail})")


def read_chunks(source: Source, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a source into chunks; DataError when it is not there at all."""
    files = source.files()
    for path in files:
        name = path.name.removesuffix(".gz")
        if name.endswith(".parquet"):
            yield from _parquet_chunks(path, chunk_bytes)
        elif name.endswith(".json"):
            yield Chunk(str(path), 1, path)
        else:
            yield from _line_chunks(path, chunk_bytes)
    if not files:
        yield from _dataset_chunks(source, chunk_bytes)


def read_records(chunk: Chunk, source: Source) -> Iterator[tuple[int, Record | Reject]]:
    """The numbered records of a chunk that satisfy the source's `where`."""
    for number, record in _all_records(chunk):
        if source.where is None or isinstance(record, Reject):
            yield number, record
        elif source.where[0] not in record:
            yield number, _missing(source.where[0], record)
        elif str(record[source.where[0]]) == source.where[1]:
            yield number, record


def _missing(column: str, record: Record) -> Reject:
    return Reject("missing column", f"no column {column!r} among {', '.join(record)}")


def record_id(record: Record, source: Source) -> str | None:
    """The id of a record, as text, if the source has ids and the record one."""
    identity = record.get(source.id_column) if source.id_column else None
    return None if identity is None else str(identity)


def check_text(value: Any, column: str, record: Record) -> Reject | None:
    """What is wrong with a text, if anything is."""
    if column not in record:
        return _missing(column, record)
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
    elif isinstance(payload, ParquetRows):
        yield from _rows(_parquet_batches(chunk.file, payload), chunk.first)
    else:
        yield from _rows(pyarrow.ipc.open_stream(payload), chunk.first)


def _rows(batches: Any, first: int) -> Iterator[tuple[int, Record | Reject]]:
    number = first
    try:
        for batch in batches:
            for record in _to_dictionaries(batch):
                yield number, record
                number += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        _raise_if_of_the_system(error)
        yield number, Reject("damaged parquet", f"the rest of its rows is lost ({_first(error)})")


def _to_dictionaries(batch: pyarrow.RecordBatch) -> list[Record]:
    """Rows as dictionaries; a value that Python cannot hold, as a date far away, is None."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, pyarrow.ArrowException):
        columns = [[_value(scalar) for scalar in column] for column in batch.columns]
        names = batch.schema.names
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _value(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return None


def _parquet_batches(file: str, rows: ParquetRows) -> Iterator[pyarrow.RecordBatch]:
    """The rows, for which their group is read from its beginning."""
    seen = 0
    source = pyarrow.parquet.ParquetFile(file)
    for batch in source.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[rows.group]):
        first, last = max(rows.start - seen, 0), min(rows.stop - seen, len(batch))
        if first < last:
            yield batch.slice(first, last - first)
        seen += len(batch)
        if seen >= rows.stop:
            return


def _raise_if_of_the_system(error: BaseException) -> None:
    """A file that is gone, a disk that fails: nothing is wrong with the data."""
    if isinstance(error, OSError) and error.errno:
        raise error


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
    return _checked_object(record)


def _checked_object(value: Any) -> Record | Reject:
    if not isinstance(value, dict):
        return Reject("wrong type", f"a JSON {type(value).__name__}, expected an object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for inside in parts for part in inside if isinstance(part, dict | list)]
        if not level:
            return value
    return Reject("nested too deep", f"more than {MAX_DEPTH} lists and objects in each other")


def _json_list(path: Path) -> Iterator[Record | Reject]:
    try:
        opener: Any = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "rb") as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of UTF-8, too
        yield Reject("broken file", f"it is no JSON ({error}): one object a line is .jsonl")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Reject("damaged gzip", str(error))
    else:
        if not isinstance(rows, list):
            kind = type(rows).__name__
            yield Reject("broken file", f"it holds a JSON {kind}, expected a list of objects")
            return
        yield from map(_checked_object, rows)


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


def _parquet_chunks(path: Path, chunk_bytes: int) -> Iterator[Chunk]:
    try:
        metadata = pyarrow.parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowInvalid, OSError) as error:
        _raise_if_of_the_system(error)
        yield Chunk(str(path), 1, Reject("damaged parquet", f"the file is lost ({_first(error)})"))
        return
    first = 1
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        parts = max(1, min(MAX_PARTS, group.total_byte_size // chunk_bytes, group.num_rows))
        edges = [group.num_rows * part // parts for part in range(parts + 1)]
        for start, stop in itertools.pairwise(edges):
            yield Chunk(str(path), first + start, ParquetRows(index, start, stop))
        first += group.num_rows


def load_hub_dataset(source: Source) -> Any:
    """The train split of a data set by name, which `datasets` downloads once and maps into memory.

    Raises DataError when that fails.
    """
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split="train")
    except Exception as error:  # the hub's errors have no common base
        raise DataError(
            f"source {source.title}: {source.path} is neither a file here nor a data set that "
            f"could be loaded ({_first(error)}): without a network, download it and give its path "
            "as LANGUAGE=PATH"
        ) from None


def _dataset_chunks(source: Source, chunk_bytes: int) -> Iterator[Chunk]:
    rows = load_hub_dataset(source)
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
