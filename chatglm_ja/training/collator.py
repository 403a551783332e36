"""Batches of tensors from rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.chatglm3.tokenizer import UNK_ID


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
            "labels": torch.full(shape, chat_format.IGNORE_INDEX),
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
                    batch["labels"][index, start] = chat_format.IGNORE_INDEX
                start += length
        return batch
