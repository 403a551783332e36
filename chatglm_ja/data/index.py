"""The index of all tokenised documents or conversations: what is chosen from, and where it lies.

Held in memory, about 60 bytes for a document; the tokens are read when they are wanted.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm.auto import tqdm

from chatglm_ja.data import dedup, units
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.data.units import INDEX_COLUMNS, Finished, Task
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

TOKEN_BYTES = 4


class Index:
    """All documents of all units, in the order of sources and records; columns are arrays.

    unit, source    number of the unit and of the source
    record          number of the record that the document begins at
    length          tokens
    offset          tokens before it in its unit
    digest          128 bits of the text, uint64 [n, 2]
    dropped         why it is not used: an index into REASONS
    """

    REASONS = ("", "duplicate id", "duplicate", "near_duplicate")

    def __init__(self, sources: Sequence[Source], finished: Sequence[Finished]) -> None:
        self.sources = sources
        self.stems = [unit.stem for unit in finished]
        self.unit_sources = [unit.source for unit in finished]
        self.metas = [unit.meta for unit in finished]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in INDEX_COLUMNS}
        for stem in self.stems:
            path = stem.with_suffix(".npz")
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    for name, parts in columns.items():
                        parts.append(arrays[name])
            except (ValueError, KeyError, BadZipFile) as error:
                raise DataError(f"{path} is damaged ({error}): remove it and run again") from None
        for name, (dtype, shape) in INDEX_COLUMNS.items():
            setattr(self, name, np.concatenate([np.zeros((0, *shape), dtype), *columns[name]]))
        sizes = np.array([len(part) for part in columns["length"]], dtype=np.int64)
        # A unit's documents are first .. end.
        self.end = np.cumsum(sizes)
        self.first = self.end - sizes
        self.unit = np.repeat(np.arange(len(finished), dtype=np.int32), sizes)
        self.source = np.array(self.unit_sources, dtype=np.int16)[self.unit]
        before = np.cumsum(self.length, dtype=np.int64) - self.length
        self.offset = before - (before[self.first[self.unit]] if len(before) else 0)
        self.dropped = np.zeros(len(self.length), dtype=np.uint8)

    record: np.ndarray
    length: np.ndarray
    digest: np.ndarray
    identity: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    def drop(self, which: np.ndarray, reason: str) -> None:
        """Drop documents, bool [n], that have not been dropped before."""
        self.dropped[which & (self.dropped == 0)] = self.REASONS.index(reason)

    def drop_repeated_ids(self) -> None:
        """Ids count within a file; the first record with one is kept."""
        files: dict[tuple[int, str], int] = {}
        numbers = [
            files.setdefault((source, meta["file"]), len(files))
            for source, meta in zip(self.unit_sources, self.metas, strict=True)
        ]
        keys = np.column_stack([np.array(numbers, dtype=np.uint64)[self.unit], self.identity])
        given = (self.identity != 0).any(axis=1)
        repeated = np.zeros(len(self), dtype=bool)
        repeated[given] = dedup.mark_repeated(keys[given])
        self.drop(repeated, "duplicate id")

    def drop_duplicates(self) -> None:
        kept = self.usable()
        repeated = np.zeros(len(self), dtype=bool)
        repeated[kept] = dedup.mark_repeated(self.digest[kept])
        self.drop(repeated, "duplicate")

    def drop_near_duplicates(self, threshold: float) -> None:
        kept = self.usable()

        def band(number: int) -> np.ndarray:
            size = dedup.BAND_SIZE
            rows = slice(number * size, (number + 1) * size)
            return np.concatenate([self._hashes(unit)[rows].T for unit in range(len(self.stems))])[
                kept
            ]

        def signatures(places: np.ndarray) -> np.ndarray:
            documents = kept[places]
            found = np.empty((len(places), dedup.NUM_HASHES), dtype=np.uint32)
            for unit in np.unique(self.unit[documents]).tolist():
                mine = self.unit[documents] == unit
                found[mine] = self._hashes(unit)[:, documents[mine] - self.first[unit]].T
            return found

        def progress(numbers: Sequence[int]) -> Any:
            return tqdm(numbers, desc="near duplicates", unit=" bands")

        near = np.zeros(len(self), dtype=bool)
        if len(kept):
            near[kept] = dedup.find_near_duplicates(
                len(kept), band, signatures, threshold, progress
            )
        self.drop(near, "near_duplicate")

    def _hashes(self, unit: int) -> np.ndarray:
        """A unit's signatures [NUM_HASHES, documents], mapped: only what is used is read."""
        if self.first[unit] == self.end[unit]:
            return np.zeros((dedup.NUM_HASHES, 0), dtype=np.uint32)
        path = self.stems[unit].with_suffix(".hashes")
        return np.memmap(path, dtype="<u4", mode="r").reshape(dedup.NUM_HASHES, -1)

    def rejects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every bad record, in order: number of its source; source, file, line, reason, detail."""
        for unit, meta in enumerate(self.metas):
            origin = {"source": self.sources[self.unit_sources[unit]].title, "file": meta["file"]}
            bad = [(number, reason, detail) for number, reason, detail in meta["rejects"]]
            documents = np.arange(self.first[unit], self.end[unit])
            repeated = documents[self.dropped[documents] == self.REASONS.index("duplicate id")]
            known = "an earlier record of the file has it"
            bad += [(int(self.record[i]), "duplicate id", known) for i in repeated]
            for number, reason, detail in sorted(bad, key=lambda entry: entry[0]):
                entry = {**origin, "line": number, "reason": reason, "detail": detail}
                yield self.unit_sources[unit], entry

    def counts(self, number: int) -> dict[str, Any]:
        """What became of the records of a source, by name; the last is what can be used."""
        total: Counter[str] = Counter()
        for unit, meta in enumerate(self.metas):
            if self.unit_sources[unit] == number:
                total["documents"] += meta["found"]
                total["rejected"] += len(meta["rejects"])
                total.update(meta["counts"])
        mine = self.dropped[self.source == number]
        for code, reason in enumerate(self.REASONS[1:], start=1):
            name = "rejected" if reason == "duplicate id" else reason
            total[name] += int((mine == code).sum())
        total["kept"] = int((mine == 0).sum())
        return dict(total)

    def records_read(self, number: int) -> int:
        """How many documents and bad records a source gave."""
        metas = [
            m for m, owner in zip(self.metas, self.unit_sources, strict=True) if owner == number
        ]
        return sum(meta["found"] + len(meta["rejects"]) for meta in metas)

    def usable(self, language: str | None = None) -> np.ndarray:
        """The documents that are not dropped, in order: all, or those of a language."""
        documents = np.flatnonzero(self.dropped == 0)
        if language is None:
            return documents
        mine = [n for n, source in enumerate(self.sources) if source.language == language]
        return documents[np.isin(self.source[documents], mine)]


def make_index(
    function: Callable[[Task], dict[str, Any]],
    sources: Sequence[Source],
    folders: Sequence[Path],
    config: PrepareDataConfig,
    description: str,
) -> Index:
    """Make the units of all sources and their index, in which ids that were seen are dropped."""
    found = units.prepare(
        function,
        sources,
        folders,
        processes=config.num_processes,
        max_rejects=config.max_rejects,
        description=description,
    )
    index = Index(sources, found)
    index.drop_repeated_ids()
    return index


@functools.lru_cache(maxsize=256)
class _File:
    """An open file, kept open while it is among those used last."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


def read_tokens(
    stems: Sequence[Path],
    suffix: str,
    units: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
    """Pieces of the units' .tokens or .labels, one after the other, int32.

    Read with pread: of mapped files all that was read would count as memory of the process.
    """
    out = np.empty(int(lengths.sum()), dtype="<i4")
    view = memoryview(out.data).cast("B")
    end = 0
    for unit, offset, length in zip(
        units.tolist(), offsets.tolist(), lengths.tolist(), strict=True
    ):
        start, end = end, end + length * TOKEN_BYTES
        descriptor = _File(stems[unit].with_suffix(suffix)).descriptor
        if os.preadv(descriptor, [view[start:end]], offset * TOKEN_BYTES) != end - start:
            raise DataError(f"{stems[unit]}{suffix} ends too early: remove its folder, run again")
    return out
