"""ChatGLM3's config.json: the sizes that the pipeline needs; other architectures are refused."""

from pathlib import Path
from typing import Any

from chatglm_ja.errors import DataError
from chatglm_ja.files import read_json

# What GlmForCausalLM computes; a checkpoint that says otherwise is another architecture.
REQUIRED_CONFIG = {
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}
SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads",
    "multi_query_group_num", "layernorm_epsilon", "padded_vocab_size", "seq_length",
)  # fmt: skip
# More than any model has; the names alone of so many layers' tensors would fill a memory.
MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1


def read_config(folder: Path) -> dict[str, Any]:
    """ChatGLM3's config.json, with every field that the conversion needs."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path} not found: expected a ChatGLM3 checkpoint folder") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object: expected a ChatGLM3 config.json")
    for name, expected in REQUIRED_CONFIG.items():
        if config.get(name) != expected:
            raise DataError(
                f"{path}: {name} is {config.get(name)!r}, expected {expected!r}: this is not a "
                "ChatGLM3-6B model"
            )
    if "rope_ratio" in config and config["rope_ratio"] != 1:
        raise DataError(
            f"{path}: rope_ratio is {config['rope_ratio']!r}: the long-context variants and GLM-4 "
            "are not supported; expected chatglm3-6b or chatglm3-6b-base"
        )
    # In all else the second generation's file says the same; its prompts are others.
    if "chatglm2" in str(config.get("_name_or_path", "")).lower():
        raise DataError(
            f"{path} is of ChatGLM2 ({config['_name_or_path']}): expected chatglm3-6b or "
            "chatglm3-6b-base"
        )
    if config.get("quantization_bit"):
        raise DataError(f"{path}: the checkpoint is quantised; expected fp16, bf16 or fp32 weights")
    missing = [name for name in SIZES if config.get(name) is None]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: expected a ChatGLM3 config.json")
    wrong = [f"{name} is {config[name]!r}" for name in SIZES if not _is_size(name, config[name])]
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong)}: expected the sizes of a ChatGLM3 model")
    return config


def _is_size(name: str, value: Any) -> bool:
    if name == "layernorm_epsilon":
        return isinstance(value, float) and 0 < value < 1
    most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
    return type(value) is int and 0 < value <= most
