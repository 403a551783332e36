"""Step 4's data sets as training reads them: memory-mapped, collated into batches.

shards.py says which files and columns there are.
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
    """The shards of a data set, `name` being pretrain or sft, as one; nothing is copied."""
    shards = sorted(folder.glob(f"{name}_{split}-*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in shards])


def unpack_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """Every document or conversation of packed rows as a row of its own; no token is copied."""
    table = rows.data.table
    batches = [_unpacked_batch(batch) for batch in table.to_batches()]
    apart = pyarrow.Table.from_batches(batches, schema=table.schema)
    return datasets.Dataset(datasets.table.InMemoryTable(apart))


def _unpacked_batch(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """New offsets over the same values."""
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
        else:  # the language, of all that is in a row
            part = column.take(pyarrow.array(np.repeat(np.arange(len(counts)), counts)))
        columns.append(part.cast(field.type))
    return pyarrow.RecordBatch.from_arrays(columns, schema=batch.schema)


def check_rows(
    rows: datasets.Dataset, block_size: int, shape: ModelShape, data: Path, name: str
) -> None:
    """Raises DataError when rows do not fit: longer ones than `block_size` or than the model can
    read, or ids beyond its embeddings. No Python list of tokens is made.

    `data` and `name` are what the rows were read from.
    """
    column = rows.data.table["input_ids"]
    sizes = pyarrow.compute.list_value_length(column).to_numpy()
    longest = int(sizes.max(initial=0))
    if longest > block_size:
        raise DataError(
            f"the data's longest row has {longest} tokens, but --block-size is {block_size}: "
            "prepare the data with that size, or set it to the data's"
        )
    if longest > shape.positions:
        row = int(sizes.argmax())
        named = source_titles(data, name)
        sources = ", ".join(named[number] for number in sorted(set(rows[row]["sources"])))
        raise DataError(
            f"the data's longest row has {longest} tokens (row {row + 1}, of {sources}), but the "
            f"model reads at most {shape.positions} (max_position_embeddings): prepare the data "
            "with shorter rows"
        )
    largest = (pyarrow.compute.max(pyarrow.compute.list_flatten(c)).as_py() for c in column.chunks)
    found = max((value for value in largest if value is not None), default=0)
    if found >= shape.rows:
        raise DataError(
            f"the data holds token id {found}, but the model has {shape.rows} embedding rows: "
            "prepare the data and resize the model with the same tokenizer"
        )


def count_tokens(rows: datasets.Dataset) -> int:
    """The tokens of all rows."""
    return pyarrow.compute.sum(
        pyarrow.compute.list_value_length(rows.data.table["input_ids"])
    ).as_py()


def scored_share(rows: datasets.Dataset, sample: int) -> float:
    """The share of tokens that have a loss, over the first rows: in conversations the answers'."""
    if "labels" not in rows.column_names:
        return 1.0
    labels = [label for row in rows[:sample]["labels"] for label in row]
    return sum(label != chat_format.IGNORE_INDEX for label in labels) / max(len(labels), 1)


def source_titles(data: Path, name: str) -> list[str]:
    """The sources of a data set of step 4's folder, pretrain or sft, by number: LANGUAGE/NAME."""
    manifest = read_manifest(data)
    if manifest is None:
        raise DataError(f"{data} has no manifest, which names its sources: make it with step 4")
    try:
        return [source["name"] for source in manifest.counts[name]["sources"]]
    except (KeyError, TypeError):
        raise DataError(
            f"the manifest of {data} does not name the sources of {name}: make it with step 4"
        ) from None


def title_language(title: str) -> str:
    """The language of a source, or the kind of its conversations."""
    return title.split("/")[0]


COLUMNS = ("input_ids", "labels", "lengths", "sources")


@dataclass(frozen=True)
class SourceCount:
    """A source, and what is trained on of it: conversations, and their tokens."""

    source: str
    language: str
    examples: int
    tokens: int


def count_sources(rows: Any, named: Sequence[str]) -> list[SourceCount]:
    """What packed or unpacked rows hold of every source that they hold something of.

    `named` are the titles by number; sources of one title count as one.
    """
    examples = np.zeros(len(named), dtype=np.int64)
    tokens = np.zeros(len(named), dtype=np.int64)
    for batch in rows.data.table.to_batches():
        numbers, lengths = (batch[name].flatten().to_numpy() for name in ("sources", "lengths"))
        examples += np.bincount(numbers, minlength=len(named))
        tokens += np.bincount(numbers, lengths, len(named)).astype(np.int64)
    found: dict[str, np.ndarray] = {}
    for title, *pair in zip(named, examples, tokens, strict=True):
        if pair[0]:
            found[title] = found.get(title, np.zeros(2, dtype=np.int64)) + pair
    return [
        SourceCount(title, title_language(title), *pair.tolist()) for title, pair in found.items()
    ]


def check_conversations(rows: Any, data: Path, split: str, encoder: Any) -> None:
    """Raises DataError for the first conversation of packed rows that nothing can be learned from
    as it is: one without a trained token, with an empty answer, or whose labels are not its ids.

    Step 4 writes none; what comes from elsewhere may hold some. Says which it is of the split,
    train or validation, and of what source.
    """
    named = source_titles(data, "sft")
    # What an empty answer trains: the header's line break, and what ends it.
    nothing = len(chat_format.encode_text(encoder, "\n")) + 1
    before = 0
    for batch in rows.data.table.to_batches():
        ids, labels, lengths, sources = (batch[name].flatten().to_numpy() for name in COLUMNS)
        _check_lengths(batch, data, split, len(named))
        if not len(lengths):
            continue
        ends = np.cumsum(lengths)
        trained = labels != chat_format.IGNORE_INDEX
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
        untrained = np.logical_or.reduceat(trained, ends - lengths) == 0
        problems = {
            "has no token that is trained": ends[untrained] - 1,
            "has an empty answer": edges[np.diff(edges)[:, 0] <= nothing, 0],
            "has labels that are not its tokens": np.flatnonzero(trained & (labels != ids)),
        }
        for problem, places in problems.items():
            if not len(places):
                continue
            number = int(np.searchsorted(ends, places[0], side="right"))
            text = encoder.decode(ids[ends[number] - lengths[number] : ends[number]].tolist())
            raise DataError(
                f"{data}: {split} conversation {before + number + 1}, from "
                f"{named[sources[number]]}, {problem}: it starts {text.strip()[:60]!r}"
            )
        before += len(lengths)


def _check_lengths(batch: Any, data: Path, split: str, named: int) -> None:
    """Whether a row's lists are of the lengths that they give each other."""
    sizes = {name: pyarrow.compute.list_value_length(batch[name]).to_numpy() for name in COLUMNS}
    lengths = batch["lengths"].flatten().to_numpy()
    numbers = batch["sources"].flatten().to_numpy()
    rows = np.repeat(np.arange(len(batch)), sizes["lengths"])
    filled = np.bincount(rows, lengths, len(batch))
    good = (sizes["input_ids"] == filled) & (sizes["labels"] == filled)
    good &= sizes["sources"] == sizes["lengths"]
    if not good.all() or (lengths <= 0).any() or (numbers >= named).any():
        raise DataError(
            f"{data}: the tokens, labels, lengths and sources of a {split} row do not belong "
            "together: prepare the data again"
        )
