"""Tiny models of the architectures that people use: random weights, transformers' layout."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Of each architecture what sets it apart: tied embeddings (qwen3, gpt2), norms of queries and keys
# (qwen3), a fused MLP and rotation of half of a head (glm), absolute positions and transposed
# matrices (gpt2).
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": False},
    "qwen3": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "glm": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "attention_bias": True,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "gpt2": {"n_inner": 96, "tie_word_embeddings": True},
}


def make_tiny(kind: str, folder: Path, vocab_size: int = 320, **changes: Any) -> Path:
    """Save a model of two layers in float32 to `folder`, and return it.

    `kind` is a key of SIZES, or another model type of transformers with its sizes in `changes`.
    """
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "vocab_size": vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **sizes | SIZES.get(kind, {}) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms would be zeros and ones
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    return folder
