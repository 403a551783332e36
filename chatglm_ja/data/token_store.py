"""Tokenizing sources chunk by chunk in several processes; the chunks on disk, until packing.

A chunk of a source becomes a group of files of one name. The .json is written last, so a chunk that
has one is complete, and a killed run resumes with the first chunk that lacks it:

    000017.tokens     int32, all documents of the chunk one after another
    000017.labels     the same for the labels, of conversations only
    000017.hashes     uint32 [128, documents]: MinHash signatures, one row per hash
    000017.npz        record, length, digest, identity of each document
    000017.json       how many records were read, rejected and dropped, and why; samples of
                      what was dropped; size and SHA-256 of the other files, so that a corrupt
                      chunk is tokenized again
"""

import functools
import heapq
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel
from tqdm.auto import tqdm

from chatglm_ja.bases import families
from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.data import dedup, parallel
from chatglm_ja.data.readers import Chunk, Reject, read_chunks
from chatglm_ja.data.rejects import is_hopeless
from chatglm_ja.data.settings import TOKEN_BYTES, PrepareDataConfig
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source
from chatglm_ja.storage.files import FileRecord, find_problem, publish_file, read_json, record_file

log = logging.getLogger(__name__)

# Increased when the files of a chunk change their meaning: work of earlier versions is discarded.
FORMAT = 6
MAX_DETAIL = 200
SAMPLES = 3  # of the texts that each filter dropped, for the report
MAX_EXCERPT = 300
TOKENS, LABELS, HASHES, COLUMNS, SUMMARY = ".tokens", ".labels", ".hashes", ".npz", ".json"
COLUMN_TYPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "record": ("<i8", ()),
    "length": ("<i4", ()),
    "digest": ("<u8", (2,)),
    "identity": ("<u8", (2,)),
}


@functools.cache
def load_tokenizer(folder: Path) -> ModelTokenizer:
    """Load the tokenizer, once per process."""
    return families.load_tokenizer(folder)


class DroppedText(BaseModel):
    """A text that a filter dropped: its digest, its source and record, its beginning."""

    digest: tuple[int, int]
    origin: str
    excerpt: str

    @staticmethod
    def sample(texts: Iterable["DroppedText"]) -> list["DroppedText"]:
        """Return a few distinct ones: those with the smallest digests, whatever the chunks are."""
        distinct: dict[tuple[int, int], DroppedText] = {}
        for text in texts:
            distinct.setdefault(text.digest, text)
        return [distinct[digest] for digest in heapq.nsmallest(SAMPLES, distinct)]


class ChunkSummary(BaseModel):
    """The content of a chunk's .json.

    file       name of the file that was read
    found      documents that were read, of which `counts` were dropped
    bytes      UTF-8 bytes of their text
    rejects    number, reason and detail of each bad record
    counts     documents by the filter that dropped them; those that were cut, such as
               "shortened" ones, are kept
    dropped    by filter, samples of the texts that it dropped
    files      the chunk's other files
    """

    file: str
    found: int
    bytes: int
    rejects: list[tuple[int, str, str]]
    counts: dict[str, int]
    dropped: dict[str, list[DroppedText]]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class StoredChunk:
    """A chunk on disk: its files without their suffixes, its source's number, its summary."""

    stem: Path
    source: int
    summary: ChunkSummary


@dataclass
class TokenizedChunk:
    """A chunk in memory, with an entry for each document that is kept.

    `found`, `text_bytes` and `counts` are as in ChunkSummary.
    """

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
    dropped: dict[str, list[DroppedText]] = field(default_factory=dict)

    def add(
        self, tokens: np.ndarray, record: int, content: str | bytes, record_id: str | None
    ) -> None:
        """Add a document; documents of equal `content` are duplicates."""
        self.tokens.append(tokens)
        self.record.append(record)
        self.digest.append(dedup.text_digest(content))
        # Zeros stand for no id, or an empty one.
        self.identity.append(dedup.text_digest(record_id) if record_id else (0, 0))

    def drop(self, fate: str, text: str, origin: str) -> None:
        """Count a text that a filter drops; `origin` is its source and record."""
        self.counts[fate] += 1
        if text:
            digest = dedup.text_digest(text)
            dropped = DroppedText(digest=digest, origin=origin, excerpt=text[:MAX_EXCERPT])
            self.dropped.setdefault(fate, []).append(dropped)

    def write(self, stem: Path, source: int) -> StoredChunk:
        """Write the chunk's files, the summary last; `source` is its source's number."""
        arrays = {TOKENS: _join(self.tokens)}
        if self.labels:
            arrays[LABELS] = _join(self.labels)
        if self.signatures:
            arrays[HASHES] = np.concatenate(self.signatures).T
        for suffix, array in arrays.items():
            stem.with_suffix(suffix).write_bytes(np.ascontiguousarray(array).data)
        values = {
            "record": self.record,
            "length": [len(ids) for ids in self.tokens],
            "digest": self.digest,
            "identity": self.identity,
        }
        columns = {
            name: np.array(values[name], dtype).reshape(-1, *shape)
            for name, (dtype, shape) in COLUMN_TYPES.items()
        }
        np.savez(stem.with_suffix(COLUMNS), allow_pickle=False, **columns)
        paths = [stem.with_suffix(suffix) for suffix in (*arrays, COLUMNS)]
        summary = ChunkSummary(
            file=self.file,
            found=self.found,
            bytes=self.text_bytes,
            rejects=[(n, reject.reason, reject.detail[:MAX_DETAIL]) for n, reject in self.rejects],
            counts={str(name): count for name, count in self.counts.items()},
            dropped={str(name): DroppedText.sample(texts) for name, texts in self.dropped.items()},
            files={path.name: record_file(path) for path in paths},
        )
        with publish_file(stem.with_suffix(SUMMARY)) as path:
            path.write_text(json.dumps(summary.model_dump()), encoding="utf-8")
        return StoredChunk(stem, source, summary)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, "<i4"), *parts], dtype="<i4")


@dataclass(frozen=True)
class ChunkTask:
    """A chunk to tokenize, its source, the source's number, and the stem of the files to write."""

    chunk: Chunk
    source: Source
    number: int
    stem: Path


def tokenize_sources(
    tokenize: Callable[[ChunkTask], StoredChunk],
    sources: Sequence[Source],
    folders: Sequence[Path],
    config: PrepareDataConfig,
    description: str,
) -> list[StoredChunk]:
    """Tokenize the chunks of sources into a folder for each source, with a progress bar.

    `tokenize` returns the chunk that an earlier run stored, or tokenizes and stores it. Stops early
    when most records of a source are bad, since the source will be refused.
    """
    tasks = (
        ChunkTask(chunk, source, number, folder / f"{index:06d}")
        for number, (source, folder) in enumerate(zip(sources, folders, strict=True))
        for index, chunk in enumerate(read_chunks(source))
    )
    chunks: list[StoredChunk] = []
    read: Counter[int] = Counter()
    bad: Counter[int] = Counter()
    with tqdm(desc=description, unit="B", unit_scale=True) as bar:
        for chunk in parallel.map_in_order(tokenize, tasks, config.num_processes):
            chunks.append(chunk)
            number, summary = chunk.source, chunk.summary
            bar.update(summary.bytes)
            read[number] += summary.found + len(summary.rejects)
            bad[number] += len(summary.rejects)
            if is_hopeless(read[number], bad[number], config.max_rejects):
                break
    return chunks


def find_chunk(stem: Path, source: int) -> StoredChunk | None:
    """Return a chunk that is stored and intact, or None; all its bytes are read to check it."""
    path = stem.with_suffix(SUMMARY)
    if not path.exists():
        return None
    try:
        summary = ChunkSummary.model_validate(read_json(path))
    except ValueError:  # pydantic's ValidationError, too
        problem: str | None = f"{path.name} is corrupt"
    else:
        if summary.files.keys() >= {f"{stem.name}{TOKENS}", f"{stem.name}{COLUMNS}"}:
            problem = find_problem(path.parent, summary.files, every_byte=True)
        else:
            problem = f"{path.name} does not list the chunk's files"
        if not problem:
            return StoredChunk(stem, source, summary)
    log.warning("tokenizing %s again: %s", stem, problem)
    return None


@functools.lru_cache(maxsize=256)
class _OpenFile:
    """A file that stays open while it is among the most recently used."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


def read_tokens(
    stems: Sequence[Path], suffix: str, chunks: np.ndarray, offsets: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Read segments of chunks' tokens or labels into one int32 array, one after another.

    Segment i is `lengths[i]` tokens from `offsets[i]` on in the files `stems[chunks[i]]`. They are
    read with pread: pages of memory-mapped files would count as memory of the process.
    """
    out = np.empty(int(lengths.sum()), dtype="<i4")
    view = memoryview(out.data).cast("B")
    end = 0
    for chunk, offset, length in zip(
        chunks.tolist(), offsets.tolist(), lengths.tolist(), strict=True
    ):
        start, end = end, end + length * TOKEN_BYTES
        descriptor = _OpenFile(stems[chunk].with_suffix(suffix)).descriptor
        if os.preadv(descriptor, [view[start:end]], offset * TOKEN_BYTES) != end - start:
            raise DataError(
                f"{stems[chunk]}{suffix} is too short: remove its folder and re-run the command"
            )
    return out
