"""The index of all tokenized documents, or conversations: what to choose from, and where it lies.

It is held in memory, about 60 bytes per document; tokens stay on disk until they are packed.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from zipfile import BadZipFile

import numpy as np

from chatglm_ja.data import dedup, near_duplicates, token_store
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.token_store import COLUMN_TYPES, DroppedText, StoredChunk
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

FATES = tuple(Fate)


class DocumentIndex:
    """All documents of all chunks, in the order of sources and records; columns are arrays.

    chunk, source   number of the chunk and of the source
    record          number of the record at which the document begins
    length          tokens
    offset          tokens before it in its chunk
    digest          128 bits of the content, uint64 [n, 2]
    identity        128 bits of the record's id, uint64 [n, 2]; zeros without one
    fate            index into FATES
    """

    record: np.ndarray
    length: np.ndarray
    digest: np.ndarray
    identity: np.ndarray

    def __init__(self, sources: Sequence[Source], chunks: Iterable[StoredChunk]) -> None:
        """Index stored chunks; documents with the id of an earlier record are rejected."""
        self.sources = sources
        self.chunks = list(chunks)
        self.stems = [chunk.stem for chunk in self.chunks]
        columns: dict[str, list[np.ndarray]] = {
            name: [np.zeros((0, *shape), dtype)] for name, (dtype, shape) in COLUMN_TYPES.items()
        }
        for stem in self.stems:
            path = stem.with_suffix(token_store.COLUMNS)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    for name, parts in columns.items():
                        parts.append(arrays[name])
            except (ValueError, KeyError, BadZipFile) as error:
                raise DataError(
                    f"{path} is corrupt ({error}): remove it and re-run the command"
                ) from None
        sizes = np.array([len(part) for part in columns["length"][1:]], dtype=np.int64)
        for name, parts in columns.items():
            setattr(self, name, np.concatenate(parts))
        # The documents of a chunk are first .. end.
        self.end = np.cumsum(sizes)
        self.first = self.end - sizes
        self.chunk = np.repeat(np.arange(len(self.chunks), dtype=np.int32), sizes)
        source_numbers = np.array([chunk.source for chunk in self.chunks], dtype=np.int16)
        self.source = source_numbers[self.chunk]
        before = np.cumsum(self.length, dtype=np.int64) - self.length
        self.offset = before - (before[self.first[self.chunk]] if len(before) else 0)
        self.fate = np.full(len(self), FATES.index(Fate.KEPT), dtype=np.uint8)
        # Reject documents whose id an earlier record of the same file has.
        numbers: dict[tuple[int, str], int] = defaultdict(itertools.count().__next__)
        file_numbers = [numbers[chunk.source, chunk.summary.file] for chunk in self.chunks]
        with_id = np.flatnonzero((self.identity != 0).any(axis=1))
        files = np.array(file_numbers, dtype=np.uint64)[self.chunk]
        keys = np.column_stack([files, self.identity])[with_id]
        self.fate[with_id[dedup.mark_repeated(keys)]] = FATES.index(Fate.REJECTED)

    def __len__(self) -> int:
        return len(self.length)

    def is_fate(self, fate: Fate) -> np.ndarray:
        """Return which documents have a fate, bool [n]."""
        return self.fate == FATES.index(fate)

    def kept_documents(self, language: str | None = None) -> np.ndarray:
        """Return the numbers of the documents that are kept: all, or those of a language."""
        documents = np.flatnonzero(self.is_fate(Fate.KEPT))
        if language is None:
            return documents
        numbers = [n for n, source in enumerate(self.sources) if source.language == language]
        return documents[np.isin(self.source[documents], numbers)]

    def drop_duplicates(self) -> None:
        """Drop documents whose content equals that of an earlier one that is kept."""
        documents = self.kept_documents()
        repeated = documents[dedup.mark_repeated(self.digest[documents])]
        self.fate[repeated] = FATES.index(Fate.DUPLICATE)

    def drop_near_duplicates(self, threshold: float, processes: int) -> None:
        """Drop documents similar to an earlier one; `threshold` is their Jaccard similarity."""
        candidates = self.kept_documents()
        if len(candidates):
            paths = [stem.with_suffix(token_store.HASHES) for stem in self.stems]
            sizes = (self.end - self.first).tolist()
            chosen = np.packbits(self.is_fate(Fate.KEPT))
            files = near_duplicates.SignatureFiles(paths, sizes, chosen)
            # A file that a kill leaves behind is removed by its ending.
            scratch = self.stems[0].with_name("near_duplicates.part")
            is_near = near_duplicates.find_near_duplicates(files, threshold, processes, scratch)
            self.fate[candidates[is_near]] = FATES.index(Fate.NEAR_DUPLICATE)

    def read_document(self, document: int, suffix: str = token_store.TOKENS) -> np.ndarray:
        """Read the tokens, or labels, of a document."""
        row = [document]
        return token_store.read_tokens(
            self.stems, suffix, self.chunk[row], self.offset[row], self.length[row]
        )

    def rejects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield every bad record in order: its source's number, and a row of rejects.jsonl."""
        repeated = self.is_fate(Fate.REJECTED)
        for number, chunk in enumerate(self.chunks):
            origin = {"source": self.sources[chunk.source].title, "file": chunk.summary.file}
            documents = np.arange(self.first[number], self.end[number])
            known = "an earlier record of the file has it"
            bad = list(chunk.summary.rejects)
            bad += [
                (int(self.record[i]), "duplicate id", known) for i in documents[repeated[documents]]
            ]
            for record, reason, detail in sorted(bad, key=lambda entry: entry[0]):
                yield chunk.source, {**origin, "line": record, "reason": reason, "detail": detail}

    def dropped_texts(self) -> dict[Fate, list[DroppedText]]:
        """Return samples of the texts that each filter dropped, of those that dropped any."""
        dropped = [chunk.summary.dropped for chunk in self.chunks]
        samples = {
            fate: DroppedText.sample(text for texts in dropped for text in texts.get(fate, ()))
            for fate in FATES
        }
        return {fate: texts for fate, texts in samples.items() if texts}

    def counts(self, number: int) -> dict[str, int]:
        """Count the records of a source by fate; "documents" are all but the unreadable ones."""
        total: Counter[str] = Counter()
        for chunk in self.chunks:
            if chunk.source == number:
                total["documents"] += chunk.summary.found
                total[str(Fate.REJECTED)] += len(chunk.summary.rejects)
                total.update(chunk.summary.counts)
        own = self.source == number
        for fate in (Fate.REJECTED, Fate.DUPLICATE, Fate.NEAR_DUPLICATE, Fate.KEPT):
            total[str(fate)] += int((self.is_fate(fate) & own).sum())
        return dict(total)

    def records_read(self, number: int) -> int:
        """Count the records that were read of a source, bad ones included."""
        summaries = [chunk.summary for chunk in self.chunks if chunk.source == number]
        return sum(summary.found + len(summary.rejects) for summary in summaries)
