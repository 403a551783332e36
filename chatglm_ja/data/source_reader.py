"""Reading whole sources in one process: texts, conversations, or records of another kind.

Steps 1, 2 and 7 read so. They clean texts, pass over bad records and count them, as step 4 does
in several processes (token_store.py):

    reader = SourceReader(config)
    for text in reader.texts(source): ...
    reader.check()                          # names the bad records; refuses too many

All readers are iterators: memory holds no corpus.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from chatglm_ja.data import conversations, corpus, readers, rejects
from chatglm_ja.data.readers import Chunk, Record, Reject
from chatglm_ja.data.rejects import RejectCount
from chatglm_ja.data.settings import MAX_REJECTS, UNICODE_FORM, ReadingConfig
from chatglm_ja.messages import Message
from chatglm_ja.sources import Source

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class SourceReader:
    """Reads sources with the settings of a step; without a step, with the default ones."""

    def __init__(self, config: ReadingConfig | None = None) -> None:
        self.unicode_form = config.unicode_form if config else UNICODE_FORM
        self.max_rejects = config.max_rejects if config else MAX_REJECTS
        self.rejected = 0  # bad records of the sources that were checked
        self._counts: list[RejectCount] = []  # of sources that are being read

    def items(
        self, source: Source, parse: Callable[[Chunk], Iterator[Item | tuple[int, Reject]]]
    ) -> Iterator[Item]:
        """Yield what `parse` makes of a source's chunks, without bad records.

        Raises DataError at the end of the source, or early, if too many are bad.
        """
        count = RejectCount(source)
        self._counts.append(count)
        for chunk in readers.read_chunks(source):
            for item in parse(chunk):
                count.read += 1
                if not isinstance(item, tuple):
                    yield item
                    continue
                count.add(chunk.file, *item)
                if rejects.is_hopeless(count.read, count.reasons.total(), self.max_rejects):
                    self.check(count)
        self.check(count)

    def check(self, *counts: RejectCount) -> None:
        """Name the bad records that were read since the last check.

        Raises DataError if too many are bad. A reader that stops before the end of a source is to
        call this.
        """
        checked = counts or tuple(count for count in self._counts if count.read)
        self._counts = [count for count in self._counts if count not in checked]
        rejects.check_rejects(checked, self.max_rejects)
        for count in checked:
            if count.reasons:
                self.rejected += count.reasons.total()
                log.warning("passed over %s; the first: %s", count, count.first)

    def records(self, source: Source, parse: Callable[[Record], Item | Reject]) -> Iterator[Item]:
        """Yield what `parse` makes of a source's records, without bad ones; see `items`."""

        def parse_chunk(chunk: Chunk) -> Iterator[Item | tuple[int, Reject]]:
            for number, record in readers.read_records(chunk, source):
                parsed = record if isinstance(record, Reject) else parse(record)
                yield (number, parsed) if isinstance(parsed, Reject) else parsed

        return self.items(source, parse_chunk)

    def texts(self, source: Source) -> Iterator[str]:
        """Yield the cleaned documents of a source, in order, without empty ones."""
        documents = self.items(
            source, lambda chunk: corpus.read_documents(chunk, source, self.unicode_form)
        )
        return (document.text for document in documents if document.text)

    def texts_in_turn(self, sources: Iterable[Source]) -> Iterator[str]:
        """Yield the documents of several sources, one from each in turn.

        The start of the stream so holds documents of every source.
        """
        rounds = itertools.zip_longest(*map(self.texts, sources))
        return (text for texts in rounds for text in texts if text is not None)

    def texts_by_language(self, sources: Iterable[Source]) -> dict[str, Iterator[str]]:
        """Return a stream of documents for each language; nothing is read yet."""
        by_language: dict[str, list[Source]] = {}
        for source in sources:
            by_language.setdefault(source.language, []).append(source)
        return {language: self.texts_in_turn(group) for language, group in by_language.items()}

    def conversations(self, source: Source) -> Iterator[list[Message]]:
        """Yield the messages of a source's conversations that end with an answer, in order."""
        parsed = self.items(
            source,
            lambda chunk: conversations.parse_conversations(chunk, source, self.unicode_form),
        )
        return (c.messages for c in parsed if c.messages[-1]["role"] == "assistant")
