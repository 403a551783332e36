"""Activations that the backward pass computes again, instead of the forward pass keeping them.

    level       kept of a layer, besides its input                        computed again
    none        everything that autograd saves                            nothing
    selective   attention, and the matrix products before and after it    norms, rotary positions,
                                                                          the MLP
    full        nothing                                                   the layer

The selective level keeps what is narrow and takes long to compute (Korthikanti et al., arXiv
2205.05198). At ChatGLM3-6B's size it keeps 0.7 MB a token more than the full level, for a quarter
less to compute again.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from chatglm_ja.bases.shape import Linear, ModelShape

Level = Literal["none", "selective", "full"]

_OPERATIONS = torch.ops.aten
_PRODUCTS = (_OPERATIONS.mm.default, _OPERATIONS.addmm.default)
_ATTENTION = (
    _OPERATIONS._scaled_dot_product_flash_attention.default,
    _OPERATIONS._scaled_dot_product_flash_attention_for_cpu.default,
    _OPERATIONS._scaled_dot_product_efficient_attention.default,
    _OPERATIONS._scaled_dot_product_cudnn_attention.default,
)


def is_kept(linear: Linear, shape: ModelShape) -> bool:
    """Return whether the selective level keeps a linear layer's output: the MLP's is not."""
    return max(linear.inputs, linear.outputs) < shape.ffn


def kept_bytes(shape: ModelShape, level: Level, width: int) -> int:
    """Return the bytes per token that a layer keeps, of numbers of `width` bytes; not for none."""
    if level == "full":
        return width * shape.hidden
    products = sum(linear.outputs for linear in shape.linears if is_kept(linear, shape))
    sums = 4 * shape.heads  # logarithms of the softmax's sums
    return width * (shape.hidden + shape.attention + products) + sums


def recompute_activations(layers: nn.ModuleList, shape: ModelShape, level: Level) -> None:
    """Make the layers of a model of this shape recompute their activations in the backward pass.

    This is inside of a layer's forward pass, so that torch.compile sees it.
    """
    if level == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if level == "selective":
        kept = {(x.inputs, x.outputs) for x in shape.linears if is_kept(x, shape)}
        policy = functools.partial(_choose, kept)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    for layer in layers:
        layer.forward = _traceable(functools.partial(checkpoint, layer.forward, **options))


def _traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, called from this file: torch.compile skips what begins in torch's."""

    def call(*inputs: Any, **options: Any) -> Any:
        return function(*inputs, **options)

    return call


def _choose(
    kept: set[tuple[int, int]], _: Any, operation: Any, *values: Any, **__: Any
) -> CheckpointPolicy:
    """Choose what is saved of an operation: `kept` are the sizes of the matrices of products."""
    is_saved = operation in _ATTENTION or (
        operation in _PRODUCTS and tuple(values[-1].shape) in kept
    )
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
