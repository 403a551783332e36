"""Training only the embedding rows that were added, while the base's rows stay as they are.

    embed_tokens  [ old: frozen | new: trained ]     the base's ids and special tokens | new pieces
    lm_head       [ old: frozen | new: trained ]

There are gradients, float32 masters and moments for the new rows only: with 13,741 new pieces of
ChatGLM3-6B 0.11 B parameters instead of 0.64 B. Modules of this kind stand in place of the two
matrices while training; `join` puts plain ones back, in float32.
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
        """The whole matrix, put together."""
        return torch.cat([self.old, self.new.to(self.old.dtype)])


class NewRowsEmbedding(_Rows):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [...], result [..., width]: looked up in both parts, without joining them."""
        first = len(self.old)
        old = F.embedding(ids.clamp(max=first - 1), self.old)
        new = F.embedding((ids - first).clamp(min=0), self.new).to(old.dtype)
        return torch.where((ids >= first)[..., None], new, old)


class NewRowsHead(_Rows):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


def split_embeddings(model: Any, first: int) -> None:
    """Let only the rows from id `first` on of a model's two embedding matrices learn."""
    model.set_input_embeddings(NewRowsEmbedding(model.get_input_embeddings().weight.data, first))
    model.set_output_embeddings(NewRowsHead(model.get_output_embeddings().weight.data, first))


def join_embeddings(model: Any, embedding_rows: torch.Tensor, head_rows: torch.Tensor) -> None:
    """Undo `split`: plain matrices, with what was learned in place of the last rows of those given,
    which are as they were stored: training may have held the old rows in another precision."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, NewRowsEmbedding):
        weight = _with_new(embedding_rows, embedding)
        model.set_input_embeddings(nn.Embedding.from_pretrained(weight))
    if isinstance(head, NewRowsHead):
        weight = _with_new(head_rows, head)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        model.set_output_embeddings(plain)


def _with_new(stored: torch.Tensor, rows: _Rows) -> torch.Tensor:
    return torch.cat([stored[: len(rows.old)].float(), rows.new.detach().float().cpu()])
