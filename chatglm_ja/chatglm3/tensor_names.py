"""Tensor names in ChatGLM3's checkpoints and in transformers' `GlmForCausalLM`, and conversion.

The two are the same architecture. ChatGLM3 fuses the query, key and value projections into one
matrix (all query heads, then the key groups, then the value groups) and names its modules
differently. Conversion only splits and renames, so a round trip is exact to the last bit.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from chatglm_ja.chatglm3.base_config import Layout

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
    shapes: dict[str, tuple[int, ...]] = {FINAL_NORM: (hidden,)}
    shapes |= dict.fromkeys((EMBEDDING, OUTPUT_LAYER), (rows, hidden))
    layer = {
        "input_layernorm.weight": (hidden,),
        FUSED_QKV + "weight": (fused, hidden),
        FUSED_QKV + "bias": (fused,),
        "self_attention.dense.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, ffn),
    }
    for index in range(config["num_layers"]):
        shapes |= {f"{LAYER_PREFIX}{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def to_glm(
    name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert a ChatGLM3 tensor to GlmForCausalLM's name; a fused one becomes q, k and v."""
    if name in NAMES:
        yield NAMES[name], tensor
        return
    index, _, part = name.removeprefix(LAYER_PREFIX).partition(".")
    if part in LAYER_NAMES:
        yield f"model.layers.{index}.{LAYER_NAMES[part]}", tensor
        return
    kind = part.removeprefix(FUSED_QKV)
    keys = config["multi_query_group_num"] * config["kv_channels"]
    query = tensor.shape[0] - 2 * keys
    for letter, rows in zip("qkv", tensor.split([query, keys, keys]), strict=True):
        yield f"model.layers.{index}.self_attn.{letter}_proj.{kind}", rows.contiguous()


def to_layout(
    layout: Layout, name: str, tensor: torch.Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert a ChatGLM3 tensor to the names and shapes of a layout."""
    if layout is Layout.CHATGLM:
        yield name, tensor
    else:
        yield from to_glm(name, tensor, config)


def to_chatglm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert the tensors of a GlmForCausalLM to ChatGLM3's names, with q, k and v fused."""
    names = {glm: chatglm for chatglm, glm in NAMES.items()}
    layer_names = {glm: chatglm for chatglm, glm in LAYER_NAMES.items()}
    result = {}
    for name, tensor in state.items():
        if name in names:
            result[names[name]] = tensor
            continue
        index, _, part = name.removeprefix("model.layers.").partition(".")
        target = f"{LAYER_PREFIX}{index}."
        if part in layer_names:
            result[target + layer_names[part]] = tensor
        elif part.startswith("self_attn.q_proj."):
            fused = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            result[target + FUSED_QKV + part.rpartition(".")[2]] = torch.cat(fused)
    return result
