"""Reading texts and conversations, and mixing languages to exact shares.

A source is a local file (.txt, .jsonl, .json, .parquet; .gz of the text formats) or the name of
a data set that `datasets` can load. Everything is an iterator: no file is read whole.
"""

import gzip
import itertools
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from chatglm_ja.config import Source
from chatglm_ja.errors import DataError

Record = dict[str, Any]
TEXT_COLUMN = "text"
# Longer than any book in one JSON line: a file without line breaks must not fill the memory.
MAX_RECORD_CHARACTERS = 2**26
BLOCK_CHARACTERS = 2**20
# A line inside a document that is longer than this is no prose (a whole novel has fewer
# characters): base64, or a corpus whose line breaks were lost.
MAX_LINE_CHARACTERS = 1_000_000


def is_local(source: Source) -> bool:
    """Whether a source is a path rather than the name of a data set.

    Raises DataError for what looks like a path (it has a known ending) and does not exist.
    """
    path = Path(source.path)
    if path.exists():
        return True
    if path.suffix in (".gz", ".txt", ".json", ".jsonl", ".parquet") or path.is_absolute():
        raise DataError(f"source {source.label}: file {path} not found")
    return False


def local_paths(sources: Iterable[Source]) -> list[Path]:
    """The files among the sources: those whose contents can be fingerprinted."""
    return [Path(source.path) for source in sources if is_local(source)]


def read_texts(source: Source) -> Iterator[str]:
    """The documents of a source, in order; empty ones are left out.

    A .txt file is one document per line. A lone surrogate (half of a UTF-16 pair, which JSON
    can spell) would crash sentencepiece, so it is refused with its record's number.
    """
    path = Path(source.path)
    if _is_text_file(path) and is_local(source) and not (source.fields or source.where):
        for line in _lines(path):
            if line and not line.isspace():
                yield line
        return
    column = source.fields or TEXT_COLUMN
    for number, record in enumerate(read_records(source), start=1):
        text = record.get(column)
        if not isinstance(text, str):
            raise DataError(
                f"{source.path} record {number} has no text in column {column!r}; its columns are "
                f"{', '.join(record)}: name the column as {source.label}={source.path}#COLUMN"
            )
        check_unicode(text, f"{source.path} record {number}")
        if text.strip():
            yield text


def texts_by_language(sources: Iterable[Source]) -> dict[str, Iterator[str]]:
    """The documents of all sources of a label, taken from each in turn, not yet read.

    In turn, so that the first source alone cannot fill a label's share of the tokens.
    """
    by_label: dict[str, list[Source]] = {}
    for source in sources:
        by_label.setdefault(source.label, []).append(source)
    return {label: in_turn(map(read_texts, group)) for label, group in by_label.items()}


def in_turn(streams: Iterable[Iterator[str]]) -> Iterator[str]:
    """The items of several streams, one from each in turn until all have ended."""
    streams = list(streams)
    while streams:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
            else:
                yield text


def training_lines(texts: Iterable[str], counts: MutableMapping[str, Any]) -> Iterator[str]:
    """The lines of documents that hold any text, for the tokenizer's training.

    In the end `counts` holds their numbers of documents, lines and characters. Line breaks end a
    training sentence, since no piece spans one: to the tokenizers a line break is a byte. Raises
    DataError when there is no text at all, or a line that no text would have.
    """
    documents = lines = characters = 0
    for text in texts:
        documents += 1
        if len(text) > MAX_LINE_CHARACTERS:
            _check_lines(text, documents)
        # A document of one line, as in a text file, is the case that has to be fast: millions.
        for line in text.split("\n") if "\n" in text else (text,):
            if line.strip():
                lines += 1
                characters += len(line)
                yield line
    if not lines:
        raise DataError("the sources hold no text: nothing can be learned from them")
    counts.update(documents=documents, lines=lines, characters=characters)


def _check_lines(text: str, number: int) -> None:
    longest = max(text.split("\n"), key=len)
    if len(longest) > MAX_LINE_CHARACTERS:
        raise DataError(
            f"document {number} has a line of {len(longest):,} characters, which starts "
            f"{longest[:20]!r}: expected text with line breaks, at most {MAX_LINE_CHARACTERS:,} "
            "characters a line"
        )


def sample_lines(lines: Iterable[str], size: int, seed: int) -> list[str]:
    """`size` lines, each equally likely to be taken; fewer if there are not so many.

    Reservoir sampling (Vitter 1985, algorithm R): one pass, memory for the sample only. The
    same seed takes the same lines, which sentencepiece's own sampling does not promise.
    """
    rng = random.Random(seed)
    lines = iter(lines)
    sample = list(itertools.islice(lines, size))
    for seen, line in enumerate(lines, start=size + 1):
        place = int(rng.random() * seen)
        if place < size:
            sample[place] = line
    return sample


def take_characters(texts: Iterable[str], limit: int) -> list[str]:
    """Whole texts from the start, at least one, until the next would go over `limit` characters."""
    taken: list[str] = []
    total = 0
    for text in texts:
        total += len(text)
        if taken and total > limit:
            break
        taken.append(text)
    return taken


def sample_sentence(texts: Iterable[str]) -> str:
    """A line of 40 to 120 characters to show the segmentation of, or the first text's start."""
    texts = list(texts)
    lines = (line for text in texts for line in text.split("\n"))
    return next((line for line in lines if 40 <= len(line) <= 120), texts[0][:80])


def check_unicode(text: str, origin: str) -> None:
    """Refuse a text that has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin} holds the lone surrogate {text[error.start]!r} at character {error.start}: "
            "mend or remove the record"
        ) from None


def read_records(source: Source) -> Iterator[Record]:
    """The records of a source that satisfy its `?COLUMN=VALUE`, as dictionaries."""
    records = _read_local(Path(source.path)) if is_local(source) else _read_dataset(source)
    if source.where is None:
        return records
    column, value = source.where
    return (record for record in records if str(record.get(column)) == value)


def _read_local(path: Path) -> Iterator[Record]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
                yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path} is not a parquet file ({error})") from None
    elif name.endswith(".json"):
        records = _parse_json("".join(_blocks(path)), path, 1)
        if not isinstance(records, list) or not all(isinstance(row, dict) for row in records):
            raise DataError(f"{path} is not a JSON list of objects")
        yield from records
    elif name.endswith((".jsonl", ".txt")):
        is_json = name.endswith(".jsonl")
        for number, line in enumerate(_lines(path), start=1):
            if is_json and line.strip():
                record = _parse_json(line, path, number)
                if not isinstance(record, dict):
                    raise DataError(f"{path} line {number} is not a JSON object")
                yield record
            elif not is_json:
                yield {TEXT_COLUMN: line}
    else:
        raise DataError(f"{path}: expected a .txt, .jsonl, .json or .parquet file")


def _is_text_file(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".txt")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file without their ends, read in blocks: an endless one is refused."""
    rest, number = "", 0
    for block in _blocks(path):
        lines = (rest + block).split("\n")
        rest = lines.pop()
        number += len(lines)
        yield from lines
        if len(rest) > MAX_RECORD_CHARACTERS:
            raise DataError(
                f"{path} line {number + 1} is longer than {MAX_RECORD_CHARACTERS:,} characters: "
                "expected a document or a JSON object a line"
            )
    if rest:
        yield rest


def _blocks(path: Path) -> Iterator[str]:
    """A text file, also gzipped, in blocks; says which file is not UTF-8 or is damaged."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            while block := file.read(BLOCK_CHARACTERS):
                yield block
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): convert it first") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error})") from None


def _parse_json(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} line {number} is not JSON ({error})") from None


def _read_dataset(source: Source) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.subset, split="train", streaming=True)
    except Exception as error:  # the hub's errors have no common base
        reason = str(error).split("\n")[0]
        raise DataError(
            f"source {source.label}: {source.path} is neither a file here nor a data set that "
            f"could be loaded ({reason}): download it and give its path"
        ) from None
    yield from rows


def mix(
    streams: Mapping[str, Iterator[list[int]]], shares: Mapping[str, float], total: int
) -> Iterator[tuple[str, list[int]]]:
    """Interleave tokenised documents so that each label's share of the tokens is exact.

    Each time the label that is furthest behind its share gives its next document; a label's
    last document is cut where its share of `total` tokens is full. Yields (label, input_ids).
    Raises DataError when a stream ends before its share is filled.
    """
    budgets = {label: round(total * share) for label, share in shares.items() if share > 0}
    taken = dict.fromkeys(budgets, 0)
    while budgets:
        label = min(budgets, key=lambda name: taken[name] / budgets[name])
        document = next(streams[label], None)
        if document is None:
            fits = int(total * taken[label] / budgets[label])
            raise DataError(
                f"{label} has {taken[label]:,} tokens for a share of {budgets[label]:,}: lower "
                f"--total-tokens to {fits:,}, add sources, or raise --max-repeats"
            )
        left = budgets[label] - taken[label]
        yield label, document[:left]
        taken[label] += min(len(document), left)
        if taken[label] >= budgets[label]:
            del budgets[label]


# --- Conversations -------------------------------------------------------------------------------

# Names of the speakers in the formats that are in use, as ChatGLM3's roles.
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "observation": "observation",
    "tool": "observation",
}


def read_conversations(source: Source) -> Iterator[list[dict[str, str]]]:
    """The conversations of a source as lists of {"role", "content"}.

    `#COLUMN` names a column that holds a list of messages (OpenAI's role/content or ShareGPT's
    from/value); `#A+B>C` takes the filled ones of the columns A and B, joined by a line break, as
    the question and C as the answer.
    """
    question_columns, arrow, answer_column = (source.fields or "messages").partition(">")
    for number, record in enumerate(read_records(source), start=1):
        origin = f"{source.path} record {number}"
        if arrow:
            question = [_column(record, name, origin) for name in question_columns.split("+")]
            messages = [
                {"role": "user", "content": "\n".join(filter(None, question))},
                {"role": "assistant", "content": _column(record, answer_column, origin)},
            ]
        else:
            messages = _messages(record, question_columns, origin)
        for message in messages:
            check_unicode(message["content"], origin)
        yield messages


def _column(record: Record, name: str, origin: str) -> str:
    value = record.get(name, None)
    if name not in record or not (value is None or isinstance(value, str)):
        raise DataError(
            f"{origin} has no text in column {name!r}; its columns: {', '.join(record)}"
        )
    return (value or "").strip()


def _messages(record: Record, column: str, origin: str) -> list[dict[str, str]]:
    turns = record.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"{origin} has no list of messages in column {column!r}; its columns: "
            f"{', '.join(record)}"
        )
    messages = []
    for turn in turns:
        speaker = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if speaker not in ROLE_NAMES or not isinstance(content, str):
            raise DataError(
                f"{origin} has a message of role {speaker!r} with content of type "
                f"{type(content).__name__}: expected text and one of {', '.join(ROLE_NAMES)}"
            )
        message = {"role": ROLE_NAMES[speaker], "content": content}
        if isinstance(turn.get("metadata"), str):
            message["metadata"] = turn["metadata"]
        messages.append(message)
    return messages
