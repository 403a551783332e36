"""Writing planned blocks as Arrow files, which `datasets` memory-maps.

    pretrain_train-00000-of-00016.arrow     input_ids, lengths, sources
    pretrain_validation-...                 the same, and language: one per block
    sft_train-..., sft_validation-...       input_ids, labels, lengths, sources

A row is a block: its tokens, the lengths of the documents or conversations in it, and the number of
each one's source (data_report.json names them). A shard is a range of blocks, so any number of
processes can write them; shards that an earlier run finished are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from tqdm.auto import tqdm

from chatglm_ja.data import parallel
from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.packing import PackingPlan
from chatglm_ja.data.token_store import LABELS, TOKENS, read_tokens
from chatglm_ja.storage.files import publish_file

# A shard of full blocks has 256 MiB of tokens.
SHARD_TOKENS = 2**26
ROWS_AT_ONCE = 1000
TOKENS_AT_ONCE = 2**24
TOKEN_COLUMNS = {"input_ids": TOKENS, "labels": LABELS}


@dataclass(frozen=True)
class _Shard:
    """A range of blocks and where their tokens lie: all that a process needs to write them.

    `chunk`, `offset` and `source` have an entry for each segment of the plan.
    """

    path: Path
    schema: pyarrow.Schema
    stems: Sequence[Path]
    plan: PackingPlan
    chunk: np.ndarray
    offset: np.ndarray
    source: np.ndarray
    languages: Sequence[str] | None


def write_shards(
    folder: Path,
    name: str,
    plan: PackingPlan,
    index: DocumentIndex,
    documents: np.ndarray,
    *,
    processes: int,
    with_labels: bool = False,
    languages: Sequence[str] | None = None,
) -> None:
    """Write the blocks of a plan whose items are places in `documents`.

    `languages` has the language of each block, if every block holds one only.
    """
    import datasets

    tokens = datasets.List(datasets.Value("int32"))
    features: dict[str, Any] = {"input_ids": tokens, "lengths": tokens, "sources": tokens}
    if with_labels:
        features["labels"] = tokens
    if languages is not None:
        features["language"] = datasets.Value("string")
    schema = datasets.Features(features).arrow_schema
    ends = np.cumsum(plan.block_lengths())
    total = int(ends[-1]) if len(ends) else 0
    count = max(1, -(-total // SHARD_TOKENS))
    bounds = np.searchsorted(ends, np.arange(1, count) * SHARD_TOKENS, side="left")
    edges = [0, *bounds.tolist(), len(plan)]

    def list_shards() -> Iterator[_Shard]:
        for number in range(count):
            first, end = edges[number : number + 2]
            part = plan.take(np.arange(first, end))
            owners = documents[part.item]
            yield _Shard(
                folder / f"{name}-{number:05d}-of-{count:05d}.arrow",
                schema,
                index.stems,
                part,
                index.chunk[owners],
                index.offset[owners] + part.start,
                index.source[owners],
                None if languages is None else languages[first:end],
            )

    done = parallel.map_in_order(_write_shard, list_shards(), min(processes, count))
    for _ in tqdm(done, total=count, desc=f"writing {name}", unit=" shards", disable=count == 1):
        pass


def _write_shard(shard: _Shard) -> None:
    if shard.path.exists():
        return
    with (
        publish_file(shard.path) as partial,
        open(partial, "wb") as file,
        pyarrow.ipc.new_stream(file, shard.schema) as writer,
    ):
        longest = int(shard.plan.block_lengths().max(initial=1))
        step = max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // longest))
        for start in range(0, len(shard.plan), step):
            writer.write_batch(_make_batch(shard, start, min(start + step, len(shard.plan))))


def _make_batch(shard: _Shard, start: int, end: int) -> pyarrow.RecordBatch:
    """Build rows of a shard from slices of arrays, without Python lists of tokens."""
    bounds = shard.plan.bounds[start : end + 1]
    segments = slice(bounds[0], bounds[-1])
    lengths = shard.plan.length[segments]
    token_bounds = np.concatenate([[0], np.cumsum(lengths)])[bounds - bounds[0]]

    def make_lists(offsets: np.ndarray, values: np.ndarray) -> pyarrow.ListArray:
        return pyarrow.ListArray.from_arrays(
            pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(values, pyarrow.int32())
        )

    columns: list[pyarrow.Array] = []
    for name in shard.schema.names:
        if name in TOKEN_COLUMNS:
            place = shard.chunk[segments], shard.offset[segments], lengths
            values = read_tokens(shard.stems, TOKEN_COLUMNS[name], *place)
            columns.append(make_lists(token_bounds, values))
        elif name == "language":
            assert shard.languages is not None
            columns.append(pyarrow.array(shard.languages[start:end], pyarrow.string()))
        else:
            values = lengths if name == "lengths" else shard.source[segments]
            columns.append(make_lists(bounds - bounds[0], values))
    return pyarrow.RecordBatch.from_arrays(columns, schema=shard.schema)
