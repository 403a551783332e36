"""The model as it is trained and scored: next-token losses without the logits of a whole batch."""

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

# The bars over the shards of a checkpoint; the log says what is loaded.
transformers.utils.logging.disable_progress_bar()

# Rows of hidden states whose logits are held at once: a GPU wants larger products.
CPU_LOSS_ROWS = 256


def token_losses_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the next-token cross entropies, in nats: a float32 scalar.

    hidden [batch, length, width], weight [vocabulary, width], labels [batch, length]: position t
    predicts label t + 1. Positions whose label is IGNORE are left out before the product with
    `weight`, so they cost nothing.
    """
    return _losses(hidden, weight, labels, "sum").sum()


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross entropies one by one, float32 [trained positions], in the order of labels[:, 1:].

    The arguments are those of `token_losses_sum`, which needs one product less backwards.
    """
    return _losses(hidden, weight, labels, "none")


def _losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, reduction: str
) -> torch.Tensor:
    """Cross entropies in float32; with the reduction "sum" they may be summed already."""
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    rows = hidden[:, :-1][trained]
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    if not hasattr(F, "linear_cross_entropy"):
        _say_that_the_loss_is_plain()
        return _plain_losses(rows, weight.to(rows.dtype), targets[trained])
    # A sum taken inside is kept in the dtype of the rows: in bfloat16 it was off by 4% for 12,000
    # tokens, in float16 it overflowed. So in half precision the tokens' losses come out one by
    # one, for one more product with `weight` in the backward pass.
    losses = F.linear_cross_entropy(
        rows,
        weight.to(rows.dtype),
        targets[trained],
        reduction=reduction if rows.dtype == torch.float32 else "none",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_loss_rows(rows)),
    )
    return losses.float()


def _plain_losses(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same one by one from functions that every torch has: the logits of a chunk are computed
    again for the backward pass instead of being kept."""

    def of_chunk(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="none")

    size = _loss_rows(rows)
    parts: list[Any] = [
        checkpoint(of_chunk, chunk, weight, aims, use_reentrant=False)
        for chunk, aims in zip(rows.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


def _loss_rows(rows: torch.Tensor) -> int:
    return costs.LOSS_ROWS if rows.is_cuda else CPU_LOSS_ROWS


@functools.cache
def _say_that_the_loss_is_plain() -> None:
    """Once: the arguments are always the same."""
    log.info(
        "torch %s has no linear_cross_entropy: the loss is computed from logits, a part at a time",
        torch.__version__,
    )


class GlmForTraining(GlmForCausalLM):
    """GlmForCausalLM that returns the loss and no logits when it is given labels.

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
        """input_ids, position_ids, labels: int64 [batch, length]. The loss is the sum over the
        trained tokens divided by `num_items_in_batch`, by default their number in this batch; or,
        with the reduction "none", those of the tokens as `token_losses` has them."""
        if labels is None:
            return super().forward(input_ids, position_ids=position_ids, **kwargs)
        # Autocast leaves what is looked up in float32 embeddings, and all that is added to it, in
        # float32: twice the activations.
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
