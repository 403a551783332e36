"""Reading a source's records in chunks that can be parsed independently; bad ones are not lost.

A source is cut into chunks of about `chunk_bytes`. Where the cuts fall depends on the data alone,
so that any number of processes sees the same chunks. A chunk is small to send to a process: of an
uncompressed text file it is a place in the file, which was read only to find and count its lines.
`read_records` parses it into records, each with its number (a line of a text file, a row of a
table) and either its columns or the reason why it is rejected:

    for chunk in read_chunks(source):
        for number, record in read_records(chunk, source):   # record: dict, or Reject

A .json list is one chunk, read a record at a time. A line that never ends is skipped without being
held in memory. A file that is wrong as a whole, since it is not in UTF-8 or holds no records of its
format, ends the reading with one message.
"""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from chatglm_ja.data import hub
from chatglm_ja.data.file_start import check_start
from chatglm_ja.errors import DataError, first_line
from chatglm_ja.source_files import COMPRESSIONS, UNCOMPRESSED, file_compression, file_format
from chatglm_ja.sources import TEXT_FILE_FORMATS, Source

Record = dict[str, Any]
TEXT_COLUMN = "text"
CHUNK_BYTES = 2**23
# Longer than any book in one JSON line.
MAX_RECORD_BYTES = 2**26
# Nested lists and objects. Python's own limit depends on the depth of the call stack.
MAX_DEPTH = 100
# Read at a time of a JSON list.
LIST_CHARACTERS = 2**20
ROWS_AT_ONCE = 1000
ARROW_MAGIC = b"ARROW1"
# Reject reasons that stand for all the remaining records of a file.
LOST_FILE = (
    *(f"damaged {compression.module}" for compression in COMPRESSIONS.values()),
    "damaged parquet",
    "damaged arrow",
    "broken file",
)
_BLANKS = re.compile(r"[ \t\r\n]*")
_EMPTY_LINE = re.compile(rb"\n[ \t\r]*\n")


@dataclass(frozen=True)
class Reject:
    """Why a record cannot be used: `reason` is one of a few names, `detail` what was found."""

    reason: str
    detail: str


@dataclass(frozen=True)
class FileRange:
    """A part of an uncompressed file, in bytes; the process that parses it reads it."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Return the part; raises DataError if the file has become shorter."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if len(content) != self.length:
            raise DataError(
                f"{self.path} became shorter while it was read: expected {self.length:,} bytes at "
                f"{self.offset:,}, found {len(content):,}; re-run the command when it is complete"
            )
        return content


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file or data set; `first` is the number of the first, from 1.

    The payload is whole lines, as bytes or where they are in their file; rows as an Arrow stream;
    the path of a .json file; or a Reject in place of what could not be read.
    """

    file: str
    first: int
    payload: bytes | FileRange | pyarrow.Buffer | Path | Reject


def read_chunks(source: Source, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a source into chunks.

    Raises DataError if it does not exist, and for a file that is wrong as a whole.
    """
    paths = source.files() or hub.download_files(source)
    for path in paths:  # all of them now, not after hours
        check_start(path, source.language)
    for path in paths:
        match file_format(path):
            case "parquet":
                yield from _cut_parquet(path, chunk_bytes)
            case "arrow":
                yield from _cut_arrow(path, chunk_bytes)
            case "json":
                yield Chunk(str(path), 1, path)
            case name:
                is_text = name == "txt" and source.format in TEXT_FILE_FORMATS
                yield from _cut_text(path, chunk_bytes, source.format if is_text else "lines")
    if not paths:
        yield from _cut_table(source.path, hub.load_hub_dataset(source).data.table, chunk_bytes)


def _cut_table(name: str, table: pyarrow.Table, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a table, which may be memory-mapped: a chunk holds its rows as an Arrow stream."""
    rows = max(1, len(table) * chunk_bytes // max(1, table.nbytes))
    for start in range(0, len(table), rows):
        yield _as_chunk(name, start + 1, table.slice(start, rows))


def _as_chunk(name: str, first: int, rows: pyarrow.Table) -> Chunk:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=ROWS_AT_ONCE)
    return Chunk(name, first, stream.getvalue())


def read_records(chunk: Chunk, source: Source) -> Iterator[tuple[int, Record | Reject]]:
    """Parse a chunk into numbered records; those that the source's `where` excludes are skipped."""
    for number, record in _parse_chunk(chunk, source.format):
        if source.where is None or isinstance(record, Reject):
            yield number, record
        elif source.where[0] not in record:
            yield number, missing_column(source.where[0], record)
        elif source.matches(record[source.where[0]]):
            yield number, record


def missing_column(column: str, record: Record) -> Reject:
    """Return the Reject for a record without a column that is needed."""
    return Reject("missing column", f"found {', '.join(record)}; expected {column}")


def record_id(record: Record, source: Source) -> str | None:
    """Return a record's id as text, or None if the source or the record has none."""
    value = record.get(source.id_column) if source.id_column else None
    return None if value is None else str(value)


def check_text(value: Any, column: str, record: Record) -> Reject | None:
    """Return why the value of a text column cannot be used, or None."""
    if column not in record:
        return missing_column(column, record)
    if not isinstance(value, str):
        return Reject("wrong type", f"column {column!r} holds {type(value).__name__}, not text")
    return check_characters(value)


def check_characters(text: str) -> Reject | None:
    """Return why a text cannot be tokenized, or None.

    A lone surrogate (half of a UTF-16 pair, which JSON can spell) has no UTF-8 form and would
    crash sentencepiece. NUL is a sign of binary data.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            place = f"{text[error.start]!r} at character {error.start}"
            return Reject("lone surrogate", place)
    if "\0" in text:
        return Reject("NUL", f"at character {text.index(chr(0))}")
    return None


def _damaged(kind: str, detail: str, error: Exception) -> Reject:
    """Return the Reject for corrupt data; re-raise an error of the system, such as a failing disk.

    Errors about corrupt data may be OSErrors, too, but have no errno.
    """
    if isinstance(error, OSError) and error.errno:
        raise error
    return Reject(f"damaged {kind}", detail)


def _parse_chunk(chunk: Chunk, form: str) -> Iterator[tuple[int, Record | Reject]]:
    """Parse a chunk into numbered records; `form` is the source's format."""
    payload = chunk.payload
    if isinstance(payload, FileRange):
        payload = payload.read()
    if isinstance(payload, Reject):
        yield chunk.first, payload
    elif isinstance(payload, bytes):
        is_json = file_format(Path(chunk.file)) == "jsonl"
        if not is_json and form in TEXT_FILE_FORMATS:
            yield from _split_texts(payload, chunk.first, form)
            return
        for number, line in enumerate(_decode_lines(payload), chunk.first):
            if isinstance(line, Reject):
                yield number, line
            elif not is_json:
                yield number, {TEXT_COLUMN: line.removesuffix("\r")}
            elif line and not line.isspace():
                try:  # files that were joined have a byte-order mark inside
                    record = _check_object(json.loads(line.removeprefix("\ufeff")))
                except (ValueError, RecursionError) as error:
                    record = Reject("broken JSON", str(error))
                yield number, record
    elif isinstance(payload, Path):
        yield from enumerate(_parse_list(payload), chunk.first)
    else:
        number = chunk.first
        try:
            for batch in pyarrow.ipc.open_stream(payload):
                for record in _to_records(batch):
                    yield number, record
                    number += 1
        except (pyarrow.ArrowInvalid, OSError) as error:
            detail = f"the rest of its rows is lost ({first_line(error)})"
            yield number, _damaged("arrow", detail, error)


def _split_texts(payload: bytes, first: int, form: str) -> Iterator[tuple[int, Record | Reject]]:
    """Yield the paragraphs of a .txt file, or all of it, with the number of their first line."""

    def is_between(line: tuple[int, str]) -> bool:
        return form == "paragraphs" and not line[1].strip()

    lines = payload.decode("utf-8", "surrogateescape").split("\n")
    for is_empty, group in itertools.groupby(enumerate(lines, first), is_between):
        numbers, parts = zip(*group, strict=True)
        text = "\n".join(parts)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            yield numbers[0], _invalid_byte(ord(text[error.start]) - 0xDC00, error.start)
        else:
            if not is_empty:
                yield numbers[0], {TEXT_COLUMN: text}


def _find_ends(data: bytes, form: str) -> tuple[int, int]:
    """Return where the first and the last complete line or paragraph ends; 0 if there is none."""
    if form == "lines":
        return data.find(b"\n") + 1, data.rfind(b"\n") + 1
    ends = [match.end() for match in _EMPTY_LINE.finditer(data)] if form == "paragraphs" else []
    return (ends[0], ends[-1]) if ends else (0, 0)


def _cut_text(path: Path, chunk_bytes: int, form: str) -> Iterator[Chunk]:
    """Cut a .jsonl or .txt file into chunks of whole lines, or whole texts of the format `form`."""
    chunk = partial(Chunk, str(path))
    is_compressed = file_compression(path) is not UNCOMPRESSED
    rest, number, skipping, is_start = b"", 1, False, True
    bytes_read = 0

    def cut_off(length: int) -> bytes | FileRange:
        """Return the first bytes of `rest`, which ends where reading has come to."""
        if is_compressed:
            return rest[:length]
        return FileRange(path, bytes_read - len(rest), length)

    for block in _read_blocks(path, chunk_bytes):
        if isinstance(block, Reject):
            # The incomplete line before the damage is lost with what follows it.
            yield chunk(number, block)
            return
        bytes_read += len(block)
        if is_start:
            block, is_start = block.removeprefix(codecs.BOM_UTF8), False
        if skipping:
            end, _ = _find_ends(block, form)
            number += block.count(b"\n", 0, end or len(block))
            if not end:
                continue
            block, skipping = block[end:], False
        rest += block
        _, cut = _find_ends(rest, form)
        if cut:
            yield chunk(number, cut_off(cut))
            number += rest.count(b"\n", 0, cut)
            rest = rest[cut:]
        if len(rest) > MAX_RECORD_BYTES:
            size = f"longer than {MAX_RECORD_BYTES:,} bytes, expected one record a line"
            if form != "lines":
                size = f"a text longer than {MAX_RECORD_BYTES:,} bytes"
            yield chunk(number, Reject("endless line", size))
            number += rest.count(b"\n")
            rest, skipping = b"", True
    if rest:
        yield chunk(number, cut_off(len(rest)))


def _read_blocks(path: Path, size: int) -> Iterator[bytes | Reject]:
    """Read a file, which may be compressed, in blocks of `size` bytes.

    Of a corrupt file, what was decompressed before the damage comes first, then a Reject.
    """
    compression = file_compression(path)
    block = bytearray()
    with compression.open(path) as file:
        try:
            # read1 returns what is decompressed already; read would lose it if damage follows.
            while part := file.read1(size - len(block)):  # type: ignore[attr-defined]
                if len(part) == size:  # of an uncompressed file, and need not be copied
                    yield part
                    continue
                block += part
                if len(block) == size:
                    yield bytes(block)
                    block.clear()
        except compression.error_types() as error:
            detail = f"the rest of the file is lost ({first_line(error)})"
            reject = _damaged(compression.module, detail, error)
            yield bytes(block[: block.rfind(b"\n") + 1])
            yield reject
            return
    if block:
        yield bytes(block)


def _decode_lines(payload: bytes) -> Iterator[str | Reject]:
    """Decode the lines of a chunk; one by one only if the chunk as a whole is not UTF-8."""
    try:
        yield from payload.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        yield from map(_decode, payload.removesuffix(b"\n").split(b"\n"))


def _decode(text: bytes) -> str | Reject:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        return _invalid_byte(text[error.start], error.start)


def _invalid_byte(byte: int, place: int) -> Reject:
    return Reject("invalid UTF-8", f"byte 0x{byte:02x} at {place}")


def _check_object(value: Any) -> Record | Reject:
    """Return a JSON value if it is an object that is not nested too deep."""
    if not isinstance(value, dict):
        return Reject("wrong type", f"a JSON {type(value).__name__}, expected an object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for group in children for part in group if isinstance(part, dict | list)]
        if not level:
            return value
    return Reject("nested too deep", f"more than {MAX_DEPTH} nested lists and objects")


def _parse_list(path: Path) -> Iterator[Record | Reject]:
    """Yield the objects of a JSON list; memory holds one of them, and a block of the file."""
    compression = file_compression(path)
    with compression.open(path) as file:
        try:
            # The file's own line breaks are kept.
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            yield from map(_check_object, _parse_values(text))
        except (ValueError, RecursionError) as error:  # ValueError: UnicodeDecodeError, too
            yield Reject(
                "broken file", f"it is not a JSON list ({error}): one object a line is .jsonl"
            )
        except compression.error_types() as error:
            yield _damaged(compression.module, str(error), error)


def _parse_values(file: io.TextIOBase) -> Iterator[Any]:
    """Yield the values of a JSON list, each as soon as it is complete.

    Raises ValueError where the file is anything else.
    """
    decode = json.JSONDecoder().raw_decode
    text, place = "", 0

    def look() -> str:
        """Return the next character that is not blank."""
        nonlocal text, place
        while (place := _BLANKS.match(text, place).end()) == len(text):  # type: ignore[union-attr]
            text, place = file.read(LIST_CHARACTERS), 0
            if not text:
                raise ValueError("it ends too early")
        return text[place]

    def decode_value() -> tuple[Any, int]:
        """Return the value that begins here, and where it ends, having read as much as it takes."""
        nonlocal text, place
        while True:
            problem, found = None, (None, len(text))
            try:
                found = decode(text, place)
            except ValueError as error:
                problem = error
            more = ""
            # A value at the end, such as a number, may go on.
            if found[1] == len(text) and len(text) - place <= MAX_RECORD_BYTES:
                more = file.read(max(LIST_CHARACTERS, len(text) - place))
            if more:
                text, place = text[place:] + more, 0
            elif problem:
                raise problem
            else:
                return found

    if look() != "[":
        raise ValueError(f"it begins with {text[place : place + 10]!r}")
    place += 1
    goes_on = look() != "]"
    while goes_on:
        look()
        value, place = decode_value()
        yield value
        goes_on = look() == ","
        place += goes_on
    if text[place] != "]":
        raise ValueError(f"{text[place]!r} stands after a value, expected , or ]")
    if text[place + 1 :].strip() or file.read().strip():
        raise ValueError("it goes on after the list")


def _cut_arrow(path: Path, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a file of Arrow's stream or file format, which is memory-mapped."""
    try:
        with pyarrow.memory_map(str(path)) as file:
            is_file = file.read(len(ARROW_MAGIC)) == ARROW_MAGIC
            file.seek(0)
            table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file).read_all()
            yield from _cut_table(str(path), table, chunk_bytes)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reject = _damaged("arrow", f"the file is lost ({first_line(error)})", error)
        yield Chunk(str(path), 1, reject)


def _cut_parquet(path: Path, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a parquet file: its row groups are decoded here, once and a chunk at a time."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reject = _damaged("parquet", f"the file is lost ({first_line(error)})", error)
        yield Chunk(str(path), 1, reject)
        return
    end = 1
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        rows = max(1, group.num_rows * chunk_bytes // max(1, group.total_byte_size))
        first, end = end, end + group.num_rows
        try:
            for batch in file.iter_batches(rows, [index]):
                yield _as_chunk(str(path), first, pyarrow.Table.from_batches([batch]))
                first += len(batch)
        except (pyarrow.ArrowInvalid, OSError) as error:
            detail = f"the rest of its row group is lost ({first_line(error)})"
            yield Chunk(str(path), first, _damaged("parquet", detail, error))


def _to_records(batch: pyarrow.RecordBatch) -> list[Record]:
    """Return rows as dictionaries; values that Python cannot hold, such as far dates, are None."""

    def to_python(scalar: pyarrow.Scalar) -> Any:
        with suppress(ValueError, OverflowError, pyarrow.ArrowException):
            return scalar.as_py()

    with suppress(ValueError, OverflowError, pyarrow.ArrowException):
        return list(batch.to_pylist())
    columns = [map(to_python, column) for column in batch.columns]
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
