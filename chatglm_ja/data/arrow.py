"""Writing planned blocks as Arrow files that `datasets` maps into memory.

    pretrain_train-00000-of-00016.arrow     input_ids, lengths, sources
    pretrain_validation-...                 the same, and language: one a block
    sft_train-..., sft_validation-...       input_ids, labels, lengths, sources

A row is a block: its tokens, the lengths of the documents or conversations in it, and the number
of the source of each (data_report.json names them). A shard is a range of blocks, so that
any number of processes write them, and one that an earlier run finished is not written again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from tqdm.auto import tqdm

from chatglm_ja.data import parallel
from chatglm_ja.data.index import Index, read_tokens
from chatglm_ja.data.packing import PackingPlan
from chatglm_ja.storage.files import fsync

# A shard of full blocks has 256 MiB of tokens.
SHARD_TOKENS = 2**26
ROWS_AT_ONCE = 1000
TOKENS_AT_ONCE = 2**24
SUFFIXES = {"input_ids": ".tokens", "labels": ".labels"}


@dataclass(frozen=True)
class _Shard:
    """A range of blocks with where their tokens lie: all that a process needs to write them."""

    path: Path
    schema: pyarrow.Schema
    stems: Sequence[Path]
    plan: PackingPlan
    unit: np.ndarray
    offset: np.ndarray
    source: np.ndarray
    language: list[str] | None


def write_shards(
    folder: Path,
    name: str,
    plan: PackingPlan,
    index: Index,
    documents: np.ndarray,
    *,
    processes: int,
    with_labels: bool = False,
    language: Sequence[str] | None = None,
) -> None:
    """Write a plan of `documents`: the plan's items are places in it.

    `language` names the language of each block, where blocks hold one only.
    """
    import datasets

    tokens = datasets.List(datasets.Value("int32"))
    features: dict[str, Any] = {"input_ids": tokens, "lengths": tokens, "sources": tokens}
    if with_labels:
        features["labels"] = tokens
    if language is not None:
        features["language"] = datasets.Value("string")
    schema = datasets.Features(features).arrow_schema
    sizes = np.cumsum(plan.block_lengths())
    total = int(sizes[-1]) if len(sizes) else 0
    count = max(1, -(-total // SHARD_TOKENS))
    bounds = np.searchsorted(sizes, np.arange(1, count) * SHARD_TOKENS, side="left")
    edges = [0, *bounds.tolist(), len(plan)]

    def shards() -> Iterator[_Shard]:
        for number in range(count):
            blocks = np.arange(edges[number], edges[number + 1])
            part = plan.take(blocks)
            owners = documents[part.item]
            yield _Shard(
                folder / f"{name}-{number:05d}-of-{count:05d}.arrow",
                schema,
                index.stems,
                part,
                index.unit[owners],
                index.offset[owners] + part.start,
                index.source[owners],
                None if language is None else [language[block] for block in blocks],
            )

    written = parallel.map_in_order(_write, shards(), min(processes, count))
    for _ in tqdm(written, total=count, desc=f"writing {name}", unit=" shards", disable=count == 1):
        pass


def _write(shard: _Shard) -> None:
    if shard.path.exists():
        return
    part = shard.path.with_suffix(".part")
    with (
        open(part, "wb") as file,
        pyarrow.ipc.new_stream(file, shard.schema) as writer,
    ):
        longest = int(shard.plan.block_lengths().max(initial=1))
        step = max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // longest))
        for start in range(0, len(shard.plan), step):
            writer.write_batch(_rows(shard, start, min(start + step, len(shard.plan))))
    fsync(part)
    part.rename(shard.path)


def _rows(shard: _Shard, start: int, end: int) -> pyarrow.RecordBatch:
    """The rows of some of a shard's blocks: slices of arrays, no Python list of tokens."""
    bounds = shard.plan.bounds[start : end + 1]
    segments = slice(bounds[0], bounds[-1])
    lengths = shard.plan.length[segments]
    token_bounds = np.concatenate([[0], np.cumsum(lengths)])[bounds - bounds[0]]

    def lists(offsets: np.ndarray, values: np.ndarray) -> pyarrow.ListArray:
        return pyarrow.ListArray.from_arrays(
            pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(values, pyarrow.int32())
        )

    columns: list[pyarrow.Array] = []
    for name in shard.schema.names:
        if name in SUFFIXES:
            where = shard.unit[segments], shard.offset[segments], lengths
            columns.append(lists(token_bounds, read_tokens(shard.stems, SUFFIXES[name], *where)))
        elif name == "language":
            assert shard.language is not None
            columns.append(pyarrow.array(shard.language[start:end], pyarrow.string()))
        else:
            values = lengths if name == "lengths" else shard.source[segments]
            columns.append(lists(bounds - bounds[0], values))
    return pyarrow.RecordBatch.from_arrays(columns, schema=shard.schema)
