"""Next-token losses that never hold the logits of a whole batch.

Position t predicts label t + 1. Positions without a loss are dropped before the product with the
output matrix, so they cost nothing: hidden states are read at `find_trained(labels)`.

    labels                 -   a   b   -   -   c   -      "-" is IGNORE_INDEX
    find_trained(labels)   0   1           4              where a, b and c are predicted

`sum_losses` is for training: it computes the gradients along with the loss. `token_losses` is for
scoring: single losses, exact.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.training import costs

# Rows of hidden states whose logits are in memory at once; a GPU needs larger products.
CPU_LOSS_ROWS = 512
# Rows of the output matrix whose gradient of a chunk is in memory at once, in half precision.
GRADIENT_ROWS = 4096


def find_trained(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions before the trained tokens, int64, in the flattened labels.

    labels int64 [batch, length]. The size of the result depends on the labels: on a GPU the host
    would wait for it.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return (following.flatten() != IGNORE_INDEX).nonzero().flatten()


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return next-token cross entropies in nats, float32 [trained positions], in their order.

    hidden [batch, length, width], weight [vocabulary, width], labels int64 [batch, length]. The
    logits are computed in float32, whatever the dtype of the rest.
    """
    trained = find_trained(labels)
    rows, targets = hidden.flatten(0, 1)[trained].float(), labels.flatten()[trained + 1]
    with torch.autocast(rows.device.type, enabled=False):
        weight, size = weight.float(), _rows_at_once(rows)
        parts = [
            F.cross_entropy(F.linear(chunk, weight), expected, reduction="none")
            for chunk, expected in zip(rows.split(size), targets.split(size), strict=True)
        ]
    return torch.cat(parts)


def sum_losses(
    hidden: torch.Tensor,
    weights: Sequence[torch.Tensor],
    labels: torch.Tensor,
    trained: torch.Tensor,
) -> torch.Tensor:
    """Return the sum of the next-token cross entropies in nats, a float32 scalar.

    hidden [batch, length, width]; labels int64 [batch, length]; trained is find_trained(labels).
    `weights` are the rows of the output matrix, in one or more parts, some of which may be frozen.

    Products are computed in the dtype of autocast, or else of `hidden`; softmax, sums and stored
    gradients are float32 (float64 if `hidden` is). As the gradients are computed with the logits,
    there are three products with the matrix; a backward pass that computes the logits again takes
    four. It scales the stored gradients in place, so a second one raises RuntimeError.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    total: torch.Tensor = _SumLosses.apply(hidden, labels, trained, dtype, *weights)
    return total


class _SumLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        trained: torch.Tensor,
        dtype: torch.dtype,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        needs_hidden, _, _, _, *needs_weights = ctx.needs_input_grad
        total = hidden.new_zeros((), dtype=exact)
        hidden_gradient = hidden.new_zeros(hidden.shape, dtype=exact) if needs_hidden else None
        weight_gradients = [
            torch.zeros_like(weight, dtype=exact) if is_needed else None
            for weight, is_needed in zip(weights, needs_weights, strict=True)
        ]
        matrix, *others = (weight.to(dtype) for weight in weights)
        if others:
            matrix = torch.cat([matrix, *others])
        rows, targets = hidden.flatten(0, 1), labels.flatten()
        size = _rows_at_once(hidden)
        # Chunks share this memory: to a CPU fresh memory costs more than the arithmetic on it.
        products = hidden.new_empty(min(size, len(trained)), len(matrix), dtype=dtype)
        for chunk in trained.split(size):
            inputs, expected = rows[chunk].to(dtype), targets[chunk + 1][:, None]
            logits = torch.mm(inputs, matrix.T, out=products[: len(chunk)])
            softmax = logits.to(exact)  # the same tensor if it has that dtype
            softmax -= softmax.amax(1, keepdim=True)
            total -= softmax.gather(1, expected).sum()
            sums = softmax.exp_().sum(1, keepdim=True)
            total += sums.log().sum()
            softmax /= sums
            softmax.scatter_add_(1, expected, -torch.ones_like(sums))
            gradient = logits.copy_(softmax)
            if hidden_gradient is not None:
                hidden_gradient.flatten(0, 1)[chunk] = (gradient @ matrix).to(exact)
            columns = gradient.split([len(weight) for weight in weights], dim=1)
            for whole, part in zip(weight_gradients, columns, strict=True):
                if whole is not None:
                    _add_product(whole, part.T, inputs)
        ctx.save_for_backward(hidden_gradient, *weight_gradients)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # autograd converts them to the dtypes of what they belong to.
        hidden, *weights = (None if g is None else g.mul_(scale) for g in ctx.saved_tensors)
        return hidden, None, None, None, *weights


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to `total`, whose dtype may be larger, some rows at a time."""
    for rows, factors in zip(total.split(GRADIENT_ROWS), left.split(GRADIENT_ROWS), strict=True):
        if rows.dtype == right.dtype:
            torch.addmm(rows, factors, right, out=rows)
        else:
            rows += factors @ right


def _rows_at_once(rows: torch.Tensor) -> int:
    return costs.LOSS_ROWS if rows.is_cuda else CPU_LOSS_ROWS
