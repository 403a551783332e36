"""Step 4's data sets as training reads them: memory-mapped, checked, counted by source.

arrow.py describes the files and their columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.chatglm3.base_config import ModelShape
from chatglm_ja.errors import DataError
from chatglm_ja.storage.manifest import read_manifest


def load_rows(folder: Path, name: str, split: str) -> datasets.Dataset:
    """Memory-map the shards of a split as one data set; `name` is pretrain or sft."""
    shards = sorted(folder.glob(f"{name}_{split}-*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in shards])


def unpack_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """Split packed rows into one row per document or conversation, without copying tokens."""
    table = rows.data.table
    batches = [_unpack_batch(batch) for batch in table.to_batches()]
    unpacked = pyarrow.Table.from_batches(batches, schema=table.schema)
    return datasets.Dataset(datasets.table.InMemoryTable(unpacked))


def _unpack_batch(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Build lists with new offsets over the same values."""
    counts = pyarrow.compute.list_value_length(batch["lengths"]).to_numpy()
    lengths = batch["lengths"].flatten().to_numpy()
    starts = {
        "input_ids": np.concatenate([[0], np.cumsum(lengths)]),
        "lengths": np.arange(len(lengths) + 1),
    }
    starts |= {"labels": starts["input_ids"], "sources": starts["lengths"]}
    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if field.name in starts:
            offsets = pyarrow.array(starts[field.name], pyarrow.int32())
            part = pyarrow.ListArray.from_arrays(offsets, column.flatten())
        else:  # the language, one per row
            part = column.take(pyarrow.array(np.repeat(np.arange(len(counts)), counts)))
        columns.append(part.cast(field.type))
    return pyarrow.RecordBatch.from_arrays(columns, schema=batch.schema)


def check_rows(
    rows: datasets.Dataset, block_size: int, shape: ModelShape, data: Path, name: str
) -> None:
    """Raise DataError for rows longer than `block_size` or the model's window, or unknown ids.

    `data` and `name` are the folder and the data set that the rows were read from.
    """
    column = rows.data.table["input_ids"]
    sizes = pyarrow.compute.list_value_length(column).to_numpy()
    longest = int(sizes.max(initial=0))
    if longest > block_size:
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
    largest = (pyarrow.compute.max(pyarrow.compute.list_flatten(c)).as_py() for c in column.chunks)
    largest_id = max((value for value in largest if value is not None), default=0)
    if largest_id >= shape.rows:
        raise DataError(
            f"the data holds token id {largest_id}, but the model has {shape.rows} embedding rows: "
            "prepare the data and resize the model with the same tokenizer"
        )


def count_tokens(rows: datasets.Dataset) -> int:
    """Count the tokens of all rows."""
    return pyarrow.compute.sum(
        pyarrow.compute.list_value_length(rows.data.table["input_ids"])
    ).as_py()


def scored_share(rows: datasets.Dataset, sample: int) -> float:
    """Return the share of trained tokens in the first `sample` rows; 1 for pretraining blocks."""
    if "labels" not in rows.column_names:
        return 1.0
    labels = [label for row in rows[:sample]["labels"] for label in row]
    return sum(label != chat_format.IGNORE_INDEX for label in labels) / max(len(labels), 1)


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


COLUMNS = ("input_ids", "labels", "lengths", "sources")


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


def check_conversations(rows: Any, data: Path, split: str, tokenizer: Any) -> None:
    """Raise DataError for the first conversation of packed rows that cannot be trained on.

    Such a conversation has no trained token, an empty answer, or labels that are not its ids. Step
    4 writes none, but data from elsewhere may hold some. The message says where it is in the split,
    train or validation, and its source.
    """
    titles = source_titles(data, "sft")
    # An empty answer trains only the header's line break and the token that ends the answer.
    empty_answer = len(chat_format.encode_text(tokenizer, "\n")) + 1
    before = 0
    for batch in rows.data.table.to_batches():
        ids, labels, lengths, sources = (batch[name].flatten().to_numpy() for name in COLUMNS)
        _check_lengths(batch, data, split, len(titles))
        if not len(lengths):
            continue
        ends = np.cumsum(lengths)
        trained = labels != chat_format.IGNORE_INDEX
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
        untrained = np.logical_or.reduceat(trained, ends - lengths) == 0
        problems = {
            "has no token that is trained": ends[untrained] - 1,
            "has an empty answer": edges[np.diff(edges)[:, 0] <= empty_answer, 0],
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


def _check_lengths(batch: Any, data: Path, split: str, num_sources: int) -> None:
    """Raise DataError if the lists of a row have lengths that contradict each other."""
    sizes = {name: pyarrow.compute.list_value_length(batch[name]).to_numpy() for name in COLUMNS}
    lengths = batch["lengths"].flatten().to_numpy()
    numbers = batch["sources"].flatten().to_numpy()
    rows = np.repeat(np.arange(len(batch)), sizes["lengths"])
    filled = np.bincount(rows, lengths, len(batch))
    good = (sizes["input_ids"] == filled) & (sizes["labels"] == filled)
    good &= sizes["sources"] == sizes["lengths"]
    if not good.all() or (lengths <= 0).any() or (numbers >= num_sources).any():
        raise DataError(
            f"{data}: the tokens, labels, lengths and sources of a {split} row do not match: "
            "prepare the data again"
        )
