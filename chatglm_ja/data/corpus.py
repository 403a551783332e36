"""Documents of text sources, and samples from a stream of texts.

Documents are cleaned as they are read (cleaning.py). Step 4 reads them chunk by chunk, in several
processes; other code calls `SourceReader.texts` (source_reader.py).

In the WikiText corpora (format wikitext; Merity et al. 2016, arXiv 1609.07843) a record is a line
of an article, with spaces around punctuation, and "@-@", "@,@" and "@.@" for a hyphen inside a word
and the separators inside a number. That markup is undone:

     = Robert Boulter =                          Robert Boulter
                                                 An English film, television and
     An English film , television and    ->      theatre actor (born in 1978-79).
     theatre actor ( born in 1978 @-@ 79 ) .     Career
     = = Career = =
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from chatglm_ja.data import cleaning, readers
from chatglm_ja.data.readers import Chunk, Reject
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

# A longer line is not prose, since a whole novel has fewer characters: it is base64, or a corpus
# whose line breaks were lost.
MAX_LINE_CHARACTERS = 1_000_000

# WikiText: a title has one = on each side, a section's heading two or more.
_TITLE = re.compile(r" = (?!= )(.*\S) = ?\n?")
# At most six: without a limit, matching a line of = takes cubic time.
_HEADING = re.compile(r" (?:= ){1,6}(.*?)(?: =){1,6} ?\n?")
_JOINED = re.compile(r" @([-,.])@ ")
_CLOSING = re.compile(r" ([,.;:!?%)\]}]|'(?:s|t|re|ve|ll|d|m)\b|n't\b)")
_OPENING = re.compile(r"([(\[{$£]) ")
_QUOTED = re.compile(r'" (.*?) "', re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A cleaned text, and the number and id of the record at which it begins."""

    record: int
    text: str
    id: str | None = None


def read_documents(
    chunk: Chunk, source: Source, unicode_form: str
) -> Iterator[Document | tuple[int, Reject]]:
    """Parse a chunk into cleaned documents and, for bad records, their numbers and Rejects.

    In the format wikitext, lines are joined into articles; an article that continues in the next
    chunk becomes two documents.
    """
    for number, text, record_id in _read_texts(chunk, source):
        if isinstance(text, Reject):
            yield number, text
            continue
        text = cleaning.clean(text, unicode_form)
        reject = _check_lines(text)
        yield (number, reject) if reject else Document(number, text, record_id)


def _read_texts(chunk: Chunk, source: Source) -> Iterator[tuple[int, str | Reject, str | None]]:
    """Yield the number, the text or a Reject, and the id of each record of a chunk."""
    column = source.columns or readers.TEXT_COLUMN
    lines: list[tuple[int, str]] = []
    for number, record in readers.read_records(chunk, source):
        if isinstance(record, Reject):
            yield number, record, None
        elif reject := readers.check_text(record.get(column), column, record):
            yield number, reject, None
        elif source.format == "wikitext":
            lines.append((number, record[column]))
        else:
            yield number, record[column], readers.record_id(record, source)
    for number, text in join_articles(lines):
        yield number, text, None


def _check_lines(text: str) -> Reject | None:
    if len(text) > MAX_LINE_CHARACTERS:
        longest = max(text.split("\n"), key=len)
        if len(longest) > MAX_LINE_CHARACTERS:
            return Reject(
                "endless line",
                f"{len(longest):,} characters, which start {longest[:20]!r}; expected at most "
                f"{MAX_LINE_CHARACTERS:,}",
            )
    return None


def restore_line(line: str) -> str:
    """Return a line as it was written before the corpus was tokenized."""
    if heading := _HEADING.fullmatch(line):
        line = heading[1]
    line = _JOINED.sub(r"\1", line.strip())
    line = _CLOSING.sub(r"\1", line)
    line = _OPENING.sub(r"\1", line)
    # Quotes open and close in turn, which tells which of their spaces to remove. Without this
    # limit, each opening quote after the last closing one is a search to the end.
    end = line.rfind(' "') + 2
    return _QUOTED.sub(r'"\1"', line[:end]) + line[end:]


def join_articles(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join numbered lines into restored articles, each with the number of its first line."""
    first = 0
    article: list[str] = []
    for number, line in lines:
        if _TITLE.fullmatch(line) and article:
            yield first, "\n".join(article)
            article = []
        if text := restore_line(line):
            if not article:
                first = number
            article.append(text)
    if article:
        yield first, "\n".join(article)


def training_lines(texts: Iterable[str], counts: MutableMapping[str, Any]) -> Iterator[str]:
    """Yield the non-blank lines of documents, the sentences on which a tokenizer is trained.

    A line is a sentence because no piece spans a line break, which the tokenizers encode as a byte.
    At the end, `counts` holds the numbers of documents, lines and characters. Raises DataError if
    there is no text.
    """
    documents = lines = characters = 0
    for text in texts:
        documents += 1
        # Text files give millions of documents of one line, which are not to be split.
        for line in text.split("\n") if "\n" in text else (text,):
            if line.strip():
                lines += 1
                characters += len(line)
                yield line
    if not lines:
        raise DataError("the sources hold no text, expected at least one line: check the paths")
    counts.update(documents=documents, lines=lines, characters=characters)


def sample_lines(lines: Iterable[str], size: int, seed: int) -> list[str]:
    """Sample `size` lines uniformly; all of them if there are fewer.

    Reservoir sampling (Vitter 1985, algorithm R) reads the lines once and holds only the sample.
    The same seed gives the same sample, which sentencepiece's own sampling does not promise.
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
    """Return the first texts up to `limit` characters in all, at least one text."""
    first_texts: list[str] = []
    total = 0
    for text in texts:
        total += len(text)
        if first_texts and total > limit:
            break
        first_texts.append(text)
    return first_texts


def sample_sentence(texts: Iterable[str]) -> str:
    """Return the first line of 40 to 120 characters, as an example; or the first text's start."""
    texts = list(texts)
    lines = (line for text in texts for line in text.split("\n"))
    return next((line for line in lines if 40 <= len(line) <= 120), texts[0][:80])
