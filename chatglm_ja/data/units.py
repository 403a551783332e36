"""Tokenised documents and conversations between reading and packing, on the disk.

A unit is what one chunk of a source became. Its files are complete when its .json is there, so a
run that was killed goes on with the first unit that is missing:

    000017.tokens     int32, all documents of the unit one after the other
    000017.labels     the same for the labels, conversations only
    000017.hashes     uint32 [128, documents]: MinHash signatures, a row for each hash
    000017.npz        record, length, digest, identity of each document
    000017.json       how many records were read, rejected and dropped, and why; the other files'
                      sizes and SHA-256, so that a damaged unit is made again
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from tqdm.auto import tqdm

from chatglm_ja.data import dedup, parallel
from chatglm_ja.data.readers import Chunk, Reject, read_chunks
from chatglm_ja.sources import Source
from chatglm_ja.storage import files

_RECORDS = TypeAdapter(dict[str, files.FileRecord])
log = logging.getLogger(__name__)

# Changes when the files of a unit come to mean something else.
FORMAT = 2
# A source of which this many records or more were read stops early when most of them are bad.
EARLY_RECORDS = 20_000
MAX_DETAIL = 200
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
        columns = {".tokens": _flat(self.tokens)}
        if self.labels:
            columns[".labels"] = _flat(self.labels)
        if self.signatures:
            columns[".hashes"] = np.concatenate(self.signatures).T
        for suffix, array in columns.items():
            stem.with_suffix(suffix).write_bytes(np.ascontiguousarray(array).data)
        typed = {
            name: np.array(arrays[name], dtype).reshape(-1, *shape)
            for name, (dtype, shape) in INDEX_COLUMNS.items()
        }
        np.savez(stem.with_suffix(".npz"), allow_pickle=False, **typed)
        written = [stem.with_suffix(suffix) for suffix in (*columns, ".npz")]
        meta = {
            "file": self.file,
            "found": self.found,
            "bytes": self.text_bytes,
            "rejects": [
                (number, reject.reason, reject.detail[:MAX_DETAIL])
                for number, reject in self.rejects
            ],
            "counts": dict(self.counts),
            "files": {path.name: files.record_file(path).model_dump() for path in written},
        }
        part = stem.with_suffix(".part")
        part.write_text(json.dumps(meta), encoding="utf-8")
        files.fsync(part)
        part.rename(stem.with_suffix(".json"))
        return meta


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, "<i4"), *parts], dtype="<i4")


NO_IDENTITY = (0, 0)


def identity(value: str | None) -> tuple[int, int]:
    """The digest of a record's id; zeros for none, or an empty one."""
    return dedup.text_digest(value) if value else NO_IDENTITY


@dataclass(frozen=True)
class Task:
    """A chunk to make a unit of."""

    source: Source
    chunk: Chunk
    stem: Path


def contents(
    sources: Sequence[Source], fingerprints: Sequence[str], shared: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What shapes the units of each source: its files, its declaration, settings shared by all."""
    return [
        {"files": files, "changed": source.changed(), "source": source.settings(), **shared}
        for source, files in zip(sources, fingerprints, strict=True)
    ]


@dataclass(frozen=True)
class Finished:
    """A unit on the disk: its files without their endings, the number of its source, its .json."""

    stem: Path
    source: int
    meta: dict[str, Any]


def prepare(
    function: Callable[[Task], dict[str, Any]],
    sources: Sequence[Source],
    folders: Sequence[Path],
    *,
    processes: int,
    max_rejects: float,
    description: str,
) -> list[Finished]:
    """Make the units that are missing in each source's folder, in several processes; returns all.

    `function` writes a task's unit and returns what its .json holds. A source whose records are
    mostly bad ends the reading early: it will be refused.
    """
    begun: list[tuple[Path, int]] = []

    def tasks() -> Iterator[Task]:
        for number, source in enumerate(sources):
            for index, chunk in enumerate(read_chunks(source)):
                begun.append((folders[number] / f"{index:06d}", number))
                yield Task(source, chunk, begun[-1][0])

    units: list[Finished] = []
    read: Counter[int] = Counter()
    bad: Counter[int] = Counter()
    with tqdm(desc=description, unit="B", unit_scale=True) as bar:
        for meta in parallel.map_in_order(_Once(function), tasks(), processes):
            stem, number = begun[len(units)]
            units.append(Finished(stem, number, meta))
            bar.update(meta["bytes"])
            read[number] += meta["found"] + len(meta["rejects"])
            bad[number] += len(meta["rejects"])
            if read[number] >= EARLY_RECORDS and bad[number] > max(0.5, max_rejects) * read[number]:
                break
    return units


@dataclass(frozen=True)
class _Once:
    """Makes a task's unit unless an earlier run has finished it, and it is still whole."""

    function: Callable[[Task], dict[str, Any]]

    def __call__(self, task: Task) -> dict[str, Any]:
        done = task.stem.with_suffix(".json")
        if done.exists():
            try:
                meta = files.read_json(done)
            except ValueError:
                meta = None
            needed = {f"{done.stem}.tokens", f"{done.stem}.npz"}
            problem: str | None = f"{done.name} is damaged"
            try:
                recorded = _RECORDS.validate_python(meta["files"])
            except (ValidationError, TypeError, KeyError):
                recorded = {}
            if recorded.keys() >= needed:
                problem = files.find_problem(done.parent, recorded, every_byte=True)
            if not problem:
                return meta
            log.warning("making %s again: %s", task.stem, problem)
        return self.function(task)
