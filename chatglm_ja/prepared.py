"""Tokenised documents and conversations between reading and packing: units on the disk.

A unit is what one chunk of a source became. Its files are complete when its .json is there, so a
run that was killed goes on with the first unit that is missing:

    003-000017.tokens     int32, all documents of the unit one after the other
    003-000017.labels     the same for the labels, conversations only
    003-000017.hashes     uint32 [128, documents]: MinHash signatures, a row for each hash
    003-000017.npz        record, length, digest, identity of each document
    003-000017.json       how many records were read, rejected and dropped, and why

The index of all documents is held in memory (about 50 bytes each); tokens are read when wanted.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from chatglm_ja import duplicates, parallel
from chatglm_ja.errors import DataError
from chatglm_ja.records import Chunk, Reject, chunks
from chatglm_ja.sources import Source

# Changes when the files of a unit come to mean something else.
FORMAT = 1
TOKEN_BYTES = 4
# A source of which this many records or more were read stops early when most of them are bad.
EARLY_RECORDS = 1000
INDEX_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "record": ("<i8", ()),
    "length": ("<i4", ()),
    "digest": ("<u8", (2,)),
    "identity": ("<u8", (2,)),
}


@dataclass
class Unit:
    """What a chunk became. Arrays have an entry for each document, `tokens` for each token."""

    file: str
    tokens: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    record: list[int] = field(default_factory=list)
    digest: list[tuple[int, int]] = field(default_factory=list)
    identity: list[tuple[int, int]] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    found: int = 0
    text_bytes: int = 0
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def write(self, stem: Path) -> dict[str, Any]:
        """Write the unit's files and return what its .json holds."""
        arrays = {
            "record": self.record,
            "length": [len(ids) for ids in self.tokens],
            "digest": self.digest,
            "identity": self.identity,
        }
        _write(stem.with_suffix(".tokens"), _flat(self.tokens))
        if self.labels:
            _write(stem.with_suffix(".labels"), _flat(self.labels))
        if self.signatures:
            _write(stem.with_suffix(".hashes"), np.concatenate(self.signatures).T)
        with open(stem.with_suffix(".npz"), "wb") as file:
            typed = {}
            for name, (dtype, shape) in INDEX_COLUMNS.items():
                typed[name] = np.array(arrays[name], dtype).reshape(-1, *shape)
            np.savez(file, allow_pickle=False, **typed)
            _sync(file)
        meta = {
            "file": self.file,
            "found": self.found,
            "bytes": self.text_bytes,
            "rejects": [(number, *dataclasses.astuple(reject)) for number, reject in self.rejects],
            "counts": dict(self.counts),
        }
        part = stem.with_suffix(".part")
        with open(part, "w", encoding="utf-8") as file:
            json.dump(meta, file)
            _sync(file)
        part.rename(stem.with_suffix(".json"))
        return meta


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, "<i4"), *parts], dtype="<i4")


def _write(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        file.write(np.ascontiguousarray(array).data)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


NO_IDENTITY = (0, 0)


def identity(value: str | None) -> tuple[int, int]:
    """The digest of a record's id; zeros for none."""
    return NO_IDENTITY if value is None else duplicates.digest(value)


# --- Making units ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A chunk to make a unit of."""

    source: Source
    chunk: Chunk
    stem: Path


def prepare(
    function: Callable[[Task], dict[str, Any]],
    sources: Sequence[Source],
    folder: Path,
    *,
    processes: int,
    max_rejects: float,
    description: str,
) -> "Index":
    """Make the units that are missing in `folder`, in several processes; returns the index of all.

    `function` writes a task's unit and returns its meta data. A source whose records are mostly
    bad ends the reading early: check_rejects will refuse it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun: list[tuple[Path, int]] = []

    def tasks() -> Iterator[Task]:
        for number, source in enumerate(sources):
            for index, chunk in enumerate(chunks(source)):
                begun.append((folder / f"{number:03d}-{index:06d}", number))
                yield Task(source, chunk, begun[-1][0])

    units: list[tuple[Path, int, dict[str, Any]]] = []
    read: Counter[int] = Counter()
    bad: Counter[int] = Counter()
    with tqdm(desc=description, unit="B", unit_scale=True) as bar:
        for meta in parallel.in_order(_Once(function), tasks(), processes):
            stem, number = begun[len(units)]
            units.append((stem, number, meta))
            bar.update(meta["bytes"])
            read[number] += meta["found"] + len(meta["rejects"])
            bad[number] += len(meta["rejects"])
            if read[number] >= EARLY_RECORDS and bad[number] > max(0.5, max_rejects) * read[number]:
                break
    return Index(sources, units)


@dataclass(frozen=True)
class _Once:
    """Makes a task's unit unless an earlier run has finished it."""

    function: Callable[[Task], dict[str, Any]]

    def __call__(self, task: Task) -> dict[str, Any]:
        done = task.stem.with_suffix(".json")
        if done.exists():
            return dict(json.loads(done.read_text(encoding="utf-8")))
        return self.function(task)


# --- Reading them ---------------------------------------------------------------------------------


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

    def __init__(
        self, sources: Sequence[Source], units: Sequence[tuple[Path, int, dict[str, Any]]]
    ) -> None:
        self.sources = sources
        self.stems = [stem for stem, _, _ in units]
        self.unit_sources = [number for _, number, _ in units]
        self.metas = [meta for _, _, meta in units]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in INDEX_COLUMNS}
        for stem in self.stems:
            with np.load(stem.with_suffix(".npz"), allow_pickle=False) as arrays:
                for name, parts in columns.items():
                    parts.append(arrays[name])
        for name, (dtype, shape) in INDEX_COLUMNS.items():
            setattr(self, name, np.concatenate([np.zeros((0, *shape), dtype), *columns[name]]))
        sizes = np.array([len(part) for part in columns["length"]], dtype=np.int64)
        self.first = np.cumsum(sizes) - sizes  # of each unit
        self.unit = np.repeat(np.arange(len(units), dtype=np.int32), sizes)
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
        """Ids count within a source; the first record with one is kept."""
        keys = np.column_stack([self.source.astype(np.uint64), self.identity])
        given = (self.identity != 0).any(axis=1)
        repeated = np.zeros(len(self), dtype=bool)
        repeated[given] = duplicates.repeated(keys[given])
        self.drop(repeated, "duplicate id")

    def drop_duplicates(self) -> None:
        kept = np.flatnonzero(self.dropped == 0)
        repeated = np.zeros(len(self), dtype=bool)
        repeated[kept] = duplicates.repeated(self.digest[kept])
        self.drop(repeated, "duplicate")

    def drop_near_duplicates(self, threshold: float) -> None:
        kept = np.flatnonzero(self.dropped == 0)

        def band(number: int) -> np.ndarray:
            size = duplicates.BAND_SIZE
            rows = slice(number * size, (number + 1) * size)
            return np.concatenate([self._hashes(unit)[rows].T for unit in range(len(self.stems))])[
                kept
            ]

        def signatures(places: np.ndarray) -> np.ndarray:
            documents = kept[places]
            found = np.empty((len(places), duplicates.NUM_HASHES), dtype=np.uint32)
            for unit in np.unique(self.unit[documents]).tolist():
                mine = self.unit[documents] == unit
                found[mine] = self._hashes(unit)[:, documents[mine] - self.first[unit]].T
            return found

        def progress(numbers: Sequence[int]) -> Any:
            return tqdm(numbers, desc="near duplicates", unit=" bands")

        near = np.zeros(len(self), dtype=bool)
        if len(kept):
            near[kept] = duplicates.near_duplicates(
                len(kept), band, signatures, threshold, progress
            )
        self.drop(near, "near_duplicate")

    def _hashes(self, unit: int) -> np.ndarray:
        """A unit's signatures [NUM_HASHES, documents], mapped: only what is used is read."""
        path = self.stems[unit].with_suffix(".hashes")
        if not path.exists() or not path.stat().st_size:
            return np.zeros((duplicates.NUM_HASHES, 0), dtype=np.uint32)
        return np.memmap(path, dtype="<u4", mode="r").reshape(duplicates.NUM_HASHES, -1)

    def rejects(self) -> Iterator[dict[str, Any]]:
        """Every bad record, in order: source, file, line, reason, detail."""
        for unit, meta in enumerate(self.metas):
            origin = {"source": self.sources[self.unit_sources[unit]].title, "file": meta["file"]}
            bad = [(number, reason, detail) for number, reason, detail in meta["rejects"]]
            end = self.first[unit + 1] if unit + 1 < len(self.first) else len(self)
            documents = np.arange(self.first[unit], end)
            repeated = documents[self.dropped[documents] == self.REASONS.index("duplicate id")]
            known = "an earlier record of this source has it"
            bad += [(int(self.record[i]), "duplicate id", known) for i in repeated]
            for number, reason, detail in sorted(bad, key=lambda entry: entry[0]):
                yield {**origin, "line": number, "reason": reason, "detail": detail}

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

    def usable(self) -> np.ndarray:
        """The documents that are not dropped, in order."""
        return np.flatnonzero(self.dropped == 0)


class Rejects:
    """The file of all bad records, and the limit of their share.

    path        the file, to be published with the result
    report      where a copy is left when the limit is passed and nothing is published
    max_share   of a source's records
    """

    def __init__(self, path: Path, report: Path, max_share: float) -> None:
        self.path, self.report, self.max_share = path, report, max_share
        path.write_bytes(b"")
        report.unlink(missing_ok=True)

    def check(self, index: Index) -> None:
        """Write those of an index; DataError when one of its sources has more than it may."""
        reasons: dict[str, Counter[str]] = {}
        with open(self.path, "a", encoding="utf-8") as file:
            for reject in index.rejects():
                reasons.setdefault(reject["source"], Counter())[reject["reason"]] += 1
                file.write(json.dumps(reject, ensure_ascii=False) + "\n")
        problems = []
        for number, source in enumerate(index.sources):
            bad, read = index.counts(number)["rejected"], index.records_read(number)
            if bad > self.max_share * read:
                found = ", ".join(
                    f"{name} {n:,}" for name, n in reasons[source.title].most_common()
                )
                problems.append(f"{source.title}: {bad:,} of {read:,} records ({found})")
        if problems:
            shutil.copyfile(self.path, self.report)
            raise DataError(
                f"more than {self.max_share:.2%} of the records are bad in {'; '.join(problems)}: "
                f"see {self.report}, then mend them or raise --max-rejects"
            )


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


# --- The workspace --------------------------------------------------------------------------------


def open_workspace(root: Path, **contents: Mapping[str, Any]) -> dict[str, Path]:
    """Folders below `root` for work in progress, each named by what shapes its content.

    What an earlier run finished is there if it had the same settings and inputs; what other ones
    left is removed.
    """
    folders = {}
    for name, content in contents.items():
        text = json.dumps([FORMAT, content], sort_keys=True, default=str)
        folders[name] = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if root.exists():
        for path in root.iterdir():
            if path not in folders.values():
                shutil.rmtree(path)
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    return folders


def close_workspace(root: Path, finished: Path) -> None:
    """Move the files of the folder `finished` beside the workspace, and remove the workspace."""
    for path in finished.iterdir():
        path.rename(root.parent / path.name)
    shutil.rmtree(root)
