"""Texts of sources: the documents of a chunk of records, and draws from a stream of texts.

Step 4 reads chunk by chunk, in many processes, and counts what is wrong. Everybody else asks for
`read_texts`, which stops at the first bad record. All are iterators: no corpus is held.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from chatglm_ja.data import wikitext
from chatglm_ja.data.readers import (
    TEXT_COLUMN,
    Chunk,
    Reject,
    check_text,
    read_chunks,
    read_records,
    record_id,
    reject_error,
)
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

# A line inside a document that is longer than this is no prose (a whole novel has fewer
# characters): base64, or a corpus whose line breaks were lost.
MAX_LINE_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Document:
    """A text as it was read, and the record that it begins at."""

    record: int
    text: str
    id: str | None = None


def read_documents(chunk: Chunk, source: Source) -> Iterator[Document | tuple[int, Reject]]:
    """The documents of a chunk, in order, and its bad records with their numbers.

    Articles in the format wikitext are put together from their lines; one that goes over the end
    of a chunk becomes two documents.
    """
    column = source.columns or TEXT_COLUMN
    found: Iterator[Document | tuple[int, Reject]] = (
        _document(number, record, column, source) for number, record in read_records(chunk, source)
    )
    if source.format == "records":
        yield from found
        return
    lines: list[tuple[int, str]] = []
    for item in found:
        if isinstance(item, Document):
            lines.append((item.record, item.text))
        else:
            yield item
    for number, text in wikitext.articles(lines):
        yield Document(number, text)


def _document(
    number: int, record: dict[str, Any] | Reject, column: str, source: Source
) -> Document | tuple[int, Reject]:
    if isinstance(record, Reject):
        return number, record
    text: Any = record.get(column)
    if reject := check_text(text, column, record):
        return number, reject
    return Document(number, text, record_id(record, source))


def read_texts(source: Source) -> Iterator[str]:
    """The documents of a source, in order; empty ones are left out.

    Raises DataError, with the file and the record's number, for the first one that is bad.
    """
    for chunk in read_chunks(source):
        for document in read_documents(chunk, source):
            if not isinstance(document, Document):
                raise reject_error(chunk.file, *document)
            if document.text and not document.text.isspace():
                yield document.text


def texts_by_language(sources: Iterable[Source]) -> dict[str, Iterator[str]]:
    """The documents of all sources of a language, taken from each in turn, not yet read.

    In turn, so that the start of the stream is not the first source alone.
    """
    by_language: dict[str, list[Source]] = {}
    for source in sources:
        by_language.setdefault(source.language, []).append(source)
    return {
        language: round_robin(map(read_texts, group)) for language, group in by_language.items()
    }


def round_robin(streams: Iterable[Iterator[str]]) -> Iterator[str]:
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
