"""What preparing texts and preparing conversations share: chunks to tokenize, and resuming.

    list_tasks --> map_in_order(tokenize, ...) --> collect_chunks --> DocumentIndex

`tokenize` is a function of prepare_texts.py or prepare_conversations.py. It returns the chunk that
an earlier run stored, or tokenizes and stores it (token_store.py).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from chatglm_ja.data.readers import Chunk, read_chunks
from chatglm_ja.data.token_store import StoredChunk
from chatglm_ja.sources import Source
from chatglm_ja.storage.inputs import Input

# Reading stops early if most of at least this many records of a source are bad.
EARLY_RECORDS = 20_000


@dataclass(frozen=True)
class ChunkTask:
    """A chunk to tokenize, its source, the source's number, and the stem of the files to write."""

    chunk: Chunk
    source: Source
    number: int
    stem: Path


def list_tasks(sources: Sequence[Source], folders: Sequence[Path]) -> Iterator[ChunkTask]:
    """Cut sources into chunks to tokenize; each source has a folder."""
    for number, (source, folder) in enumerate(zip(sources, folders, strict=True)):
        for index, chunk in enumerate(read_chunks(source)):
            yield ChunkTask(chunk, source, number, folder / f"{index:06d}")


def collect_chunks(
    results: Iterable[StoredChunk], max_rejects: float, description: str
) -> list[StoredChunk]:
    """List stored chunks as they are finished, with a progress bar.

    Stops early when most records of a source are bad, since the source will be refused.
    """
    chunks: list[StoredChunk] = []
    read: Counter[int] = Counter()
    bad: Counter[int] = Counter()
    with tqdm(desc=description, unit="B", unit_scale=True) as bar:
        for chunk in results:
            chunks.append(chunk)
            number, summary = chunk.source, chunk.summary
            bar.update(summary.bytes)
            read[number] += summary.found + len(summary.rejects)
            bad[number] += len(summary.rejects)
            if read[number] >= EARLY_RECORDS and bad[number] > max(0.5, max_rejects) * read[number]:
                break
    return chunks


def content_keys(
    sources: Sequence[Source], inputs: Sequence[Input], role: str, **settings: Any
) -> list[dict[str, Any]]:
    """Return all that shapes the tokens of each source, which names its folder (see resume.py).

    That is the source's files and declaration, the tokenizer, and `settings`.
    """
    by_role = {source.role: source for source in inputs}
    settings["tokenizer"] = by_role["step2_merge_tokenizer"].fingerprint
    return [
        {
            "files": fingerprint,
            "changed": source.modification_times(),
            "source": source.settings(),
            **settings,
        }
        for source, fingerprint in zip(sources, by_role[role].source_fingerprints, strict=True)
    ]
