"""Training only the added embedding rows, with the base's rows frozen.

    embed_tokens  [ old: frozen | new: trained ]     base ids and special tokens | new pieces
    lm_head       [ old: frozen | new: trained ]

Gradients, float32 masters and moments exist for the new rows only: with 13,741 new pieces of
ChatGLM3-6B, 0.11 B parameters instead of 0.64 B. `split_embeddings` replaces the two matrices with
modules of this file; after training `join_embeddings` restores plain ones, in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _Rows(nn.Module):
    """A matrix whose last rows are trained: old [first, width], new [rows - first, width]."""

    def __init__(self, weight: torch.Tensor, first: int) -> None:
        super().__init__()
        self.old = nn.Parameter(weight[:first].clone(), requires_grad=False)
        self.new = nn.Parameter(weight[first:].float())

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, concatenated."""
        return torch.cat([self.old, self.new.to(self.old.dtype)])

    def replace_last_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """Return a stored matrix with the trained rows in place of its last ones, float32, CPU."""
        return torch.cat([stored[: len(self.old)].float(), self.new.detach().float().cpu()])


class NewRowsEmbedding(_Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids, int64 [...], in both parts without concatenating them: [..., width]."""
        first = len(self.old)
        old = F.embedding(ids.clamp(max=first - 1), self.old)
        new = F.embedding((ids - first).clamp(min=0), self.new).to(old.dtype)
        return torch.where((ids >= first)[..., None], new, old)


class NewRowsHead(_Rows):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


def split_embeddings(model: Any, first: int) -> None:
    """Make only the rows from id `first` on trainable, in both embedding matrices."""
    model.set_input_embeddings(NewRowsEmbedding(model.get_input_embeddings().weight.data, first))
    model.set_output_embeddings(NewRowsHead(model.get_output_embeddings().weight.data, first))


def join_embeddings(model: Any, stored_input: torch.Tensor, stored_output: torch.Tensor) -> None:
    """Undo `split_embeddings`: plain float32 matrices with the trained rows in place.

    The old rows are taken from the stored matrices, as training may have rounded them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embedding.replace_last_rows(stored_input)
    model.set_input_embeddings(nn.Embedding.from_pretrained(weight))
    weight = head.replace_last_rows(stored_output)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    model.set_output_embeddings(plain)
