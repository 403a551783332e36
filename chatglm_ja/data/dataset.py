"""Step 4's packed rows as Arrow files: written in shards, memory-mapped and checked for training.

    pretrain_train-00000-of-00016.arrow     input_ids, lengths, sources
    pretrain_validation-...                 the same, and language: one per block
    sft_train-..., sft_validation-...       input_ids, labels, lengths, sources

A row is a block: its tokens, the lengths of the documents or conversations in it, and the number of
each one's source (data_report.json names them). A shard is a range of blocks, so any number of
processes can write them; shards that an earlier run finished are kept. `datasets` is imported only
where it is needed: the processes that tokenize import this module.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from tqdm.auto import tqdm

from chatglm_ja.bases.interface import FormatError, ModelTokenizer
from chatglm_ja.bases.shape import ModelShape
from chatglm_ja.data import parallel
from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.packing import PackingPlan
from chatglm_ja.data.token_store import LABELS, TOKENS, read_tokens
from chatglm_ja.errors import DataError
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.storage.files import publish_file
from chatglm_ja.storage.manifest import read_manifest

if TYPE_CHECKING:
    from datasets import Dataset

# A shard of full blocks has 256 MiB of tokens.
SHARD_TOKENS = 2**26
ROWS_AT_ONCE = 1000
TOKENS_AT_ONCE = 2**24
TOKEN_COLUMNS = {"input_ids": TOKENS, "labels": LABELS}
SFT_COLUMNS = ("input_ids", "labels", "lengths", "sources")


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
        for number, (first, end) in enumerate(itertools.pairwise(edges)):
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
                languages and languages[first:end],
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
    columns: list[pyarrow.Array] = []
    for name in shard.schema.names:
        if name == "language":
            assert shard.languages is not None
            columns.append(pyarrow.array(shard.languages[start:end], pyarrow.string()))
            continue
        offsets, values = bounds - bounds[0], shard.source[segments]
        if name in TOKEN_COLUMNS:
            place = shard.chunk[segments], shard.offset[segments], lengths
            offsets, values = token_bounds, read_tokens(shard.stems, TOKEN_COLUMNS[name], *place)
        elif name == "lengths":
            values = lengths
        arrays = (pyarrow.array(part, pyarrow.int32()) for part in (offsets, values))
        columns.append(pyarrow.ListArray.from_arrays(*arrays))
    return pyarrow.RecordBatch.from_arrays(columns, schema=shard.schema)


def load_rows(folder: Path, name: str, split: str) -> "Dataset":
    """Memory-map the shards of a split as one data set; `name` is pretrain or sft."""
    import datasets

    shards = sorted(folder.glob(f"{name}_{split}-*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in shards])


def unpack_rows(rows: "Dataset") -> "Dataset":
    """Split packed rows into one row per document or conversation, without copying tokens.

    The new columns are lists with other offsets over the same values.
    """
    import datasets

    batches = []
    for batch in rows.data.table.to_batches():
        lengths = batch["lengths"].flatten().to_numpy()
        token_starts = np.concatenate([[0], np.cumsum(lengths)])
        columns = []
        for field, column in zip(batch.schema, batch.columns, strict=True):
            if field.name == "language":  # one per row
                part = column.take(pc.list_parent_indices(batch["lengths"]))
            else:
                is_token = field.name in TOKEN_COLUMNS
                starts = token_starts if is_token else np.arange(len(lengths) + 1)
                offsets = pyarrow.array(starts, pyarrow.int32())
                part = pyarrow.ListArray.from_arrays(offsets, column.flatten())
            columns.append(part.cast(field.type))
        batches.append(pyarrow.RecordBatch.from_arrays(columns, schema=batch.schema))
    unpacked = pyarrow.Table.from_batches(batches, schema=rows.data.table.schema)
    return datasets.Dataset(datasets.table.InMemoryTable(unpacked))


def append_blocks(rows: "Dataset", blocks: "Dataset") -> "Dataset":
    """Return the conversations, then the pretraining blocks, of which all tokens are trained.

    No tokens are copied. The blocks' sources are numbered as pretraining's are.
    """
    import datasets

    table = blocks.data.table
    table = table.append_column("labels", table["input_ids"]).select(rows.column_names)
    labelled = datasets.Dataset(datasets.table.InMemoryTable(table.cast(rows.data.table.schema)))
    return datasets.concatenate_datasets([rows, labelled])


def check_rows(
    rows: "Dataset", block_size: int | None, shape: ModelShape, data: Path, name: str
) -> None:
    """Raise DataError for rows longer than `block_size` or the model's window, or unknown ids.

    `data` and `name` are the folder and the data set that the rows were read from.
    """
    column = rows.data.table["input_ids"]
    sizes = pc.list_value_length(column).to_numpy()
    longest = int(sizes.max(initial=0))
    if block_size is not None and longest > block_size:
        raise DataError(
            f"the data's longest row has {longest} tokens, but --block-size is {block_size}: "
            "set --block-size to the data's, or prepare the data with this one"
        )
    if longest > shape.positions:
        row = int(sizes.argmax())
        titles = source_titles(data, name)
        sources = ", ".join(titles[number] for number in sorted(set(rows[row]["sources"])))
        raise DataError(
            f"the data's longest row has {longest} tokens (row {row + 1}, of {sources}), but the "
            f"model reads at most {shape.positions} (max_position_embeddings): prepare the data "
            "with shorter rows"
        )
    largest_id = pc.max(pc.list_flatten(column)).as_py() or 0
    if largest_id >= shape.rows:
        raise DataError(
            f"the data holds token id {largest_id}, but the model has {shape.rows} embedding rows: "
            "prepare the data and resize the model with the same tokenizer"
        )


def count_tokens(rows: "Dataset") -> int:
    """Count the tokens of all rows."""
    return pc.sum(pc.list_value_length(rows.data.table["input_ids"])).as_py()


def scored_share(rows: "Dataset", sample: int) -> float:
    """Return the share of trained tokens in the first `sample` rows; 1 for pretraining blocks."""
    if "labels" not in rows.column_names:
        return 1.0
    labels = [label for row in rows[:sample]["labels"] for label in row]
    return sum(label != IGNORE_INDEX for label in labels) / max(len(labels), 1)


def source_titles(data: Path, name: str) -> list[str]:
    """Return the titles, LANGUAGE/NAME, of the sources of pretrain or sft in step 4's folder."""
    manifest = read_manifest(data)
    if manifest is None:
        raise DataError(f"{data} has no manifest that names its sources: make it with step 4")
    try:
        return [source["name"] for source in manifest.counts[name]["sources"]]
    except (KeyError, TypeError):
        raise DataError(
            f"the manifest of {data} does not name the sources of {name}: make it with step 4"
        ) from None


def title_language(title: str) -> str:
    """Return the language, or the kind of conversations, in a source's title."""
    return title.split("/")[0]


@dataclass(frozen=True)
class SourceCount:
    """The numbers of a source's documents or conversations, and of their tokens, in a data set."""

    source: str
    language: str
    examples: int
    tokens: int


def count_sources(rows: Any, titles: Sequence[str]) -> list[SourceCount]:
    """Count the examples and tokens of every source in packed or unpacked rows.

    `titles` are the sources' by number; sources of equal title count as one, absent ones are left
    out.
    """
    examples = np.zeros(len(titles), dtype=np.int64)
    tokens = np.zeros(len(titles), dtype=np.int64)
    for batch in rows.data.table.to_batches():
        numbers, lengths = (batch[name].flatten().to_numpy() for name in ("sources", "lengths"))
        examples += np.bincount(numbers, minlength=len(titles))
        tokens += np.bincount(numbers, lengths, len(titles)).astype(np.int64)
    counts: dict[str, np.ndarray] = {}
    for title, *pair in zip(titles, examples, tokens, strict=True):
        if pair[0]:
            counts[title] = counts.get(title, np.zeros(2, dtype=np.int64)) + pair
    return [
        SourceCount(title, title_language(title), *pair.tolist()) for title, pair in counts.items()
    ]


def check_conversations(rows: Any, data: Path, split: str, tokenizer: ModelTokenizer) -> None:
    """Raise DataError for the first conversation of packed rows that cannot be trained on.

    Such a conversation has no trained token, an empty answer, or labels that are not its ids. Step
    4 writes none, but data from elsewhere may hold some. The message says where it is in the split,
    train or validation, and its source.
    """
    titles = source_titles(data, "sft")
    empty_answers = _empty_answers(tokenizer)
    before = 0
    for batch in rows.data.table.to_batches():
        ids, labels, lengths, sources = (batch[name].flatten().to_numpy() for name in SFT_COLUMNS)
        _check_lengths(batch, data, split, len(titles))
        if not len(lengths):
            continue
        ends = np.cumsum(lengths)
        trained = labels != IGNORE_INDEX
        edges = _find_edges(trained)
        untrained = np.logical_or.reduceat(trained, ends - lengths) == 0
        problems = {
            "has no token that is trained": ends[untrained] - 1,
            "has an empty answer": _find_runs(ids, edges, empty_answers),
            "has labels that are not its tokens": np.flatnonzero(trained & (labels != ids)),
        }
        for problem, places in problems.items():
            if not len(places):
                continue
            number = int(np.searchsorted(ends, places[0], side="right"))
            text = tokenizer.decode(ids[ends[number] - lengths[number] : ends[number]].tolist())
            raise DataError(
                f"{data}: {split} conversation {before + number + 1}, from "
                f"{titles[sources[number]]}, {problem}: it starts {text.strip()[:60]!r}"
            )
        before += len(lengths)


def _empty_answers(tokenizer: ModelTokenizer) -> list[np.ndarray]:
    """Return what is trained of an empty answer, before a question and at the end."""
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    try:
        example = tokenizer.build_example([*talk, *talk])
    except FormatError:  # then step 4 refused them
        return []
    ids, labels = map(np.array, example)
    return [ids[start:end] for start, end in _find_edges(labels != IGNORE_INDEX)]


def _find_edges(trained: np.ndarray) -> np.ndarray:
    """Return where each run of trained tokens starts and ends, [runs, 2]."""
    return np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)


def _find_runs(ids: np.ndarray, edges: np.ndarray, wanted: Sequence[np.ndarray]) -> np.ndarray:
    """Return in order where the runs start whose tokens are one of the wanted."""
    is_found = np.zeros(len(edges), dtype=bool)
    for run in wanted:
        candidates = np.flatnonzero(edges[:, 1] - edges[:, 0] == len(run))
        tokens = ids[edges[candidates, :1] + np.arange(len(run))]
        is_found[candidates] |= (tokens == run).all(axis=1)
    return edges[is_found, 0]


def _check_lengths(batch: Any, data: Path, split: str, num_sources: int) -> None:
    """Raise DataError if the lists of a row have lengths that contradict each other."""
    sizes = {name: pc.list_value_length(batch[name]).to_numpy() for name in SFT_COLUMNS}
    lengths = batch["lengths"].flatten().to_numpy()
    numbers = batch["sources"].flatten().to_numpy()
    rows = pc.list_parent_indices(batch["lengths"]).to_numpy()
    filled = np.bincount(rows, lengths, len(batch))
    good = (sizes["input_ids"] == filled) & (sizes["labels"] == filled)
    good &= sizes["sources"] == sizes["lengths"]
    if not good.all() or (lengths <= 0).any() or (numbers >= num_sources).any():
        raise DataError(
            f"{data}: the tokens, labels, lengths and sources of a {split} row do not match: "
            "prepare the data again"
        )
