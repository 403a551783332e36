"""The model for training and scoring.

`Collator` makes batches of step 4's rows. `TrainingLoss` makes any of transformers' causal language
models compute next-token losses without the logits of a whole batch. `split_embeddings` leaves only
the embeddings' new rows trainable, and `join_embeddings` restores plain matrices after training, in
float32.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm_ja.bases.modules import find_embeddings
from chatglm_ja.errors import ConfigError
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.training import costs

log = logging.getLogger(__name__)

# Rows of hidden states whose logits are in memory at once; a GPU needs larger products.
CPU_LOSS_ROWS = 256


@dataclass(frozen=True)
class Collator:
    """Collates rows into int64 tensors [rows, longest row]: input_ids, labels, position_ids.

    The second dimension is at least `length`: compiled layers need batches of one shape.

    With `document_mask`, positions restart at every document, and its first token, which nothing
    before it predicts, is not trained. transformers keeps attention inside documents if positions
    restart and neither an attention mask nor a cache is given. Without it a row is one document.
    Padding is a document of its own and is never trained, so any id serves: it is 0.
    """

    document_mask: bool
    length: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(self.length, *(len(row["input_ids"]) for row in rows))
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX),
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
                    batch["labels"][index, start] = IGNORE_INDEX
                start += length
        return batch


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    reduction: Literal["none", "sum"] = "none",
) -> torch.Tensor:
    """Return next-token cross entropies in nats, float32 [trained positions], or their sum.

    hidden [batch, length, width], weight [vocabulary, width], labels int64 [batch, length]:
    position t predicts label t + 1, and single losses are ordered as labels[:, 1:]. Positions with
    the label IGNORE_INDEX are dropped before the product with `weight`, so they cost nothing.

    Single losses are for scoring: their logits are computed in float32, whatever the dtype of the
    rest. The sum is for training, in the dtype of autocast or of `hidden`; its backward pass takes
    one product fewer in float32.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    rows, targets = hidden[:, :-1][trained], targets[trained]
    size = costs.LOSS_ROWS if rows.is_cuda else CPU_LOSS_ROWS
    if reduction == "none":
        with torch.autocast(rows.device.type, enabled=False):
            return _compute_losses_in_chunks(rows.float(), weight.float(), targets, size)
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    weight = weight.to(rows.dtype)
    if not hasattr(F, "linear_cross_entropy"):
        _log_fallback()
    elif rows.is_cuda or rows.dtype == torch.float32:
        # It accumulates a sum in the dtype of the rows: in bfloat16 it was off by 4% for 12,000
        # tokens, in float16 it overflowed. So in half precision we take single losses, at the
        # price of one more product with `weight` in the backward pass. On a CPU these took three
        # times as long as the chunks below, which round logits as transformers' own loss does.
        losses = F.linear_cross_entropy(
            rows,
            weight,
            targets,
            reduction="sum" if rows.dtype == torch.float32 else "none",
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size),
        )
        return losses.float().sum()
    return _compute_losses_in_chunks(rows, weight, targets, size).sum()


def _compute_losses_in_chunks(
    rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int
) -> torch.Tensor:
    """Return single losses, float32, from the logits of `size` rows at a time.

    The backward pass recomputes the logits of each chunk, so that none are kept.
    """

    def compute(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="none")

    parts: list[Any] = [
        checkpoint(compute, chunk, weight, labels, use_reentrant=False)
        for chunk, labels in zip(rows.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


@functools.cache  # logs once
def _log_fallback() -> None:
    log.info(
        "torch %s has no linear_cross_entropy: computing the loss from logits, chunk by chunk",
        torch.__version__,
    )


class TrainingLoss:
    """Mixin of a causal language model: given labels, it returns the loss and no logits.

    With `position_ids` that restart, attention stays inside each document: transformers builds
    that mask only if there is neither an attention mask nor a cache. `loading.check_training` tells
    the architectures of which this, or the loss, is not true.
    """

    accepts_loss_kwargs = True

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        reduction: Literal["mean", "none"] = "mean",
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the loss of input_ids, position_ids and labels, int64 [batch, length].

        The loss is the sum over the trained tokens divided by `num_items_in_batch`, by default
        their number in this batch. With the reduction "none" it is that of `token_losses`.
        """
        if labels is None:
            plain: Any = super()
            return plain.forward(input_ids, position_ids=position_ids, **kwargs)
        model: Any = self
        # Autocast leaves the output of float32 embeddings, and all that is added to it, in float32,
        # which would double the activations.
        embedded = model.get_input_embeddings()(input_ids)
        if torch.is_autocast_enabled(embedded.device.type):
            embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))
        hidden = model.base_model(
            inputs_embeds=embedded, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        weight = model.get_output_embeddings().weight
        if reduction == "none":
            return CausalLMOutputWithPast(loss=token_losses(hidden, weight, labels))
        total = token_losses(hidden, weight, labels, "sum")
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum()
        return CausalLMOutputWithPast(loss=total / num_items_in_batch)


class _Rows(nn.Module):
    """A matrix whose last rows are trained: old [first, width], new [rows - first, width].

        input embedding  [ old: frozen | new: trained ]     the base's ids | new pieces
        output matrix    [ old: frozen | new: trained ]

    Gradients, float32 masters and moments exist for the new rows only: with 13,741 new pieces of
    ChatGLM3-6B, 0.11 B parameters instead of 0.64 B. Tied matrices share both parts.
    """

    def __init__(self, old: nn.Parameter, new: nn.Parameter) -> None:
        super().__init__()
        self.old, self.new = old, new

    @classmethod
    def split(cls, weight: torch.Tensor, first: int) -> Self:
        """Split a matrix before row `first`; the trained part is float32."""
        old = nn.Parameter(weight[:first].clone(), requires_grad=False)
        return cls(old, nn.Parameter(weight[first:].float()))

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, concatenated."""
        return torch.cat([self.old, self.new.to(self.old.dtype)])

    def replace_last_rows(self, stored: torch.Tensor) -> nn.Parameter:
        """Return a stored matrix with the trained rows in place of its last ones, float32, CPU."""
        rows = torch.cat([stored[: len(self.old)].float(), self.new.detach().float().cpu()])
        return nn.Parameter(rows, requires_grad=False)


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
    """Make only the rows from id `first` on trainable, in the embedding matrices.

    Raises ConfigError for an embedding that does more than look rows up, as Gemma's, which scales.
    """
    whole = model.get_input_embeddings()
    if type(whole) is not nn.Embedding:
        raise ConfigError(
            f"--embedding-rows new is for plain embeddings, but this model has "
            f"{type(whole).__name__}: pass --embedding-rows all"
        )
    is_tied = len(find_embeddings(model)) == 1
    embedding = NewRowsEmbedding.split(whole.weight.data, first)
    if is_tied:
        head = NewRowsHead(embedding.old, embedding.new)
    else:
        head = NewRowsHead.split(model.get_output_embeddings().weight.data, first)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)


def join_embeddings(model: Any, stored: Sequence[torch.Tensor]) -> None:
    """Undo `split_embeddings`: plain float32 matrices with the trained rows in place.

    The old rows are taken from the stored matrices, input first, one if they are tied: training may
    have rounded them.
    """
    parts: list[Any] = list(find_embeddings(model).values())
    weights = [part.replace_last_rows(rows) for part, rows in zip(parts, stored, strict=True)]
    rows, width = weights[0].shape
    embedding = nn.Embedding(rows, width, device="meta")
    head = nn.Linear(width, rows, bias=False, device="meta")
    embedding.weight, head.weight = weights[0], weights[-1]
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
