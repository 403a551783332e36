"""The model for training and scoring: next-token losses without the logits of a whole batch."""

import functools
import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm_ja.chatglm3.chat_format import IGNORE_INDEX
from chatglm_ja.training import costs

log = logging.getLogger(__name__)

# The progress bars over a checkpoint's shards; the log names the model that is loaded.
transformers.utils.logging.disable_progress_bar()

# Rows of hidden states whose logits are in memory at once; a GPU needs larger products.
CPU_LOSS_ROWS = 256


def token_losses_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the sum of the next-token cross entropies, in nats: a float32 scalar.

    hidden [batch, length, width], weight [vocabulary, width], labels int64 [batch, length]:
    position t predicts label t + 1. Positions with the label IGNORE_INDEX are dropped before the
    product with `weight`, so they cost nothing.
    """
    return _compute_losses(hidden, weight, labels, "sum").sum()


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropies one by one: float32 [trained positions], ordered as labels[:, 1:].

    Arguments as in `token_losses_sum`, whose backward pass takes one product fewer.
    """
    return _compute_losses(hidden, weight, labels, "none")


def _compute_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, reduction: str
) -> torch.Tensor:
    """Return float32 cross entropies; the reduction "sum" allows a sum, but does not require it."""
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    rows = hidden[:, :-1][trained]
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    weight, targets = weight.to(rows.dtype), targets[trained]
    size = costs.LOSS_ROWS if rows.is_cuda else CPU_LOSS_ROWS
    if not hasattr(F, "linear_cross_entropy"):
        _log_fallback()
        return _compute_losses_in_chunks(rows, weight, targets, size)
    # linear_cross_entropy accumulates a sum in the dtype of the rows: in bfloat16 it was off by 4%
    # for 12,000 tokens, in float16 it overflowed. So in half precision we take single losses, at
    # the price of one more product with `weight` in the backward pass.
    losses = F.linear_cross_entropy(
        rows,
        weight,
        targets,
        reduction=reduction if rows.dtype == torch.float32 else "none",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size),
    )
    return losses.float()


def _compute_losses_in_chunks(
    rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int
) -> torch.Tensor:
    """Return single losses without `linear_cross_entropy`, which older versions of torch lack.

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


class GlmForTraining(GlmForCausalLM):
    """GlmForCausalLM that returns the loss and no logits if it is given labels.

    With `position_ids` that restart, attention stays inside each document: transformers builds
    that mask only if there is neither an attention mask nor a cache.
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
            return super().forward(input_ids, position_ids=position_ids, **kwargs)
        # Autocast leaves the output of float32 embeddings, and all that is added to it, in float32,
        # which would double the activations.
        embedded = self.model.embed_tokens(input_ids)
        if torch.is_autocast_enabled(embedded.device.type):
            embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))
        hidden = self.model(
            inputs_embeds=embedded, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        if reduction == "none":
            return CausalLMOutputWithPast(loss=token_losses(hidden, self.lm_head.weight, labels))
        total = token_losses_sum(hidden, self.lm_head.weight, labels)
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum()
        return CausalLMOutputWithPast(loss=total / num_items_in_batch)
