"""Tensor names in ChatGLM3's checkpoints and in transformers' `GlmForCausalLM`, and conversion.

The two are the same architecture. ChatGLM3 fuses the query, key and value projections into one
matrix (all query heads, then the key groups, then the value groups) and names its modules
differently. Conversion only splits and renames, so a round trip is exact to the last bit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

EMBEDDING = "transformer.embedding.word_embeddings.weight"
OUTPUT_LAYER = "transformer.output_layer.weight"
FINAL_NORM = "transformer.encoder.final_layernorm.weight"
GLM_EMBEDDING = "model.embed_tokens.weight"
GLM_LM_HEAD = "lm_head.weight"
# A buffer in ChatGLM3's files, computed from the configuration; not a weight.
IGNORED = ("transformer.rotary_pos_emb.inv_freq",)

NAMES = {EMBEDDING: GLM_EMBEDDING, OUTPUT_LAYER: GLM_LM_HEAD, FINAL_NORM: "model.norm.weight"}
LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
LAYER_PREFIX = "transformer.encoder.layers."
FUSED_QKV = "self_attention.query_key_value."


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a ChatGLM3 checkpoint with this config.json, by name."""
    hidden, ffn = config["hidden_size"], config["ffn_hidden_size"]
    query = config["num_attention_heads"] * config["kv_channels"]
    fused = query + 2 * config["multi_query_group_num"] * config["kv_channels"]
    rows = config["padded_vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, hidden)}
    layer = {
        FUSED_QKV + "weight": (fused, hidden),
        FUSED_QKV + "bias": (fused,),
        "self_attention.dense.weight": (hidden, query),
        "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for index in range(config["num_layers"]):
        shapes |= {f"{LAYER_PREFIX}{index}.{name}": shape for name, shape in layer.items()}
    return shapes | {FINAL_NORM: (hidden,), OUTPUT_LAYER: (rows, hidden)}


def glm_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the same model as a GlmForCausalLM, by name."""
    return {
        glm_name: tuple(part.shape)
        for name, shape in expected_shapes(config).items()
        for glm_name, part in to_glm(name, torch.empty(shape, device="meta"), config)
    }


def glm_names(name: str) -> list[str]:
    """Return GlmForCausalLM's name for a ChatGLM3 tensor; for a fused one those of q, k and v."""
    if name in NAMES:
        return [NAMES[name]]
    index, _, part = name.removeprefix(LAYER_PREFIX).partition(".")
    layer = f"model.layers.{index}."
    if part in LAYER_NAMES:
        return [layer + LAYER_NAMES[part]]
    kind = part.removeprefix(FUSED_QKV)
    return [f"{layer}self_attn.{letter}_proj.{kind}" for letter in "qkv"]


def to_glm(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert a ChatGLM3 tensor to GlmForCausalLM's name; a fused one becomes q, k and v."""
    names = glm_names(name)
    if len(names) == 1:
        yield names[0], tensor
        return
    keys = config["multi_query_group_num"] * config["kv_channels"]
    parts = tensor.split([tensor.shape[0] - 2 * keys, keys, keys])
    for glm_name, rows in zip(names, parts, strict=True):
        yield glm_name, rows.contiguous()


def to_chatglm(name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Return the ChatGLM3 tensor `name`, made of GlmForCausalLM's, which `read` gives by name."""
    parts = [read(glm_name) for glm_name in glm_names(name)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
