"""Collate rows of step 4's data into batches of tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.chatglm3.tokenizer import UNK_ID


class Collator:
    """Collates rows into int64 tensors [rows, longest row]: input_ids, labels, position_ids.

    The second dimension is at least `length`: compiled layers need batches of one shape.

    With `document_mask`, positions restart at every document, and its first token, which nothing
    before it predicts, is not trained. transformers keeps attention inside documents if positions
    restart and neither an attention mask nor a cache is given. Without it a row is one document.
    Padding is a document of its own and is never trained.
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
            start = 0
            for length in [*(row["lengths"] if self.document_mask else [size]), longest - size]:
                batch["position_ids"][index, start : start + length] = torch.arange(length)
                if length:
                    batch["labels"][index, start] = chat_format.IGNORE_INDEX
                start += length
        return batch
