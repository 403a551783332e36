"""Step 4's data sets as training reads them: memory-mapped, collated into batches.

shards.py says which files and columns there are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch

from chatglm_ja import chat
from chatglm_ja.costs import Shape
from chatglm_ja.errors import DataError
from chatglm_ja.tokenizer import UNK_ID
from chatglm_ja.validation import titles


def read(folder: Path, name: str, split: str) -> datasets.Dataset:
    """The shards of a data set, `name` being pretrain or sft, as one; nothing is copied."""
    shards = sorted(folder.glob(f"{name}_{split}-*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in shards])


def unpacked(rows: datasets.Dataset) -> datasets.Dataset:
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


def check(rows: datasets.Dataset, block_size: int, shape: Shape, data: Path, name: str) -> None:
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
        named = titles(data, name)
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


def tokens(rows: datasets.Dataset) -> int:
    """The tokens of all rows."""
    return pyarrow.compute.sum(
        pyarrow.compute.list_value_length(rows.data.table["input_ids"])
    ).as_py()


def scored_share(rows: datasets.Dataset, sample: int) -> float:
    """The share of tokens that have a loss, over the first rows: in conversations the answers'."""
    if "labels" not in rows.column_names:
        return 1.0
    labels = [label for row in rows[:sample]["labels"] for label in row]
    return sum(label != chat.IGNORE for label in labels) / max(len(labels), 1)


class Collator:
    """Rows to a batch of tensors [rows, longest row], int64: input_ids, labels, position_ids.

    The second dimension is at least `length`: compiled layers want batches of one shape.

    With `document_mask` positions restart at every document and the first token of each, which
    nothing before it can predict, is not trained. transformers keeps attention inside documents
    where positions restart, provided that no attention mask and no cache is given. Without it
    a row is one text. Padding is a document of its own and never trained.
    """

    def __init__(self, document_mask: bool, length: int = 0) -> None:
        self.document_mask = document_mask
        self.length = length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(self.length, *(len(row["input_ids"]) for row in rows))
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, UNK_ID),
            "labels": torch.full(shape, chat.IGNORE),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
        }
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            labels = row["labels"] if "labels" in row else row["input_ids"]
            batch["input_ids"][index, :size] = torch.tensor(row["input_ids"])
            batch["labels"][index, :size] = torch.tensor(labels)
            pieces = row["lengths"] if self.document_mask else [size]
            start = 0
            for length in [*pieces, longest - size]:
                batch["position_ids"][index, start : start + length] = torch.arange(length)
                if length:
                    batch["labels"][index, start] = chat.IGNORE
                start += length
        return batch
