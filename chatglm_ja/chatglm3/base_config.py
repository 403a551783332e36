"""ChatGLM3's config.json, and the GlmConfig of the same model; nothing here imports torch."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json

if TYPE_CHECKING:  # torch takes a second to import, and --help needs this module
    import torch

MODEL_FILE = "tokenizer.model"

# What GlmForCausalLM computes. A checkpoint with other values is another architecture.
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
# The sizes in config.json: ChatGLM3's name -> GlmConfig's, in the order of the constructor.
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}
# The rotary position embedding, by GlmConfig's names: of each head, half of the dimensions rotate.
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# What a GlmConfig with ChatGLM3's architecture has; GLM-4's, for example, differs.
REQUIRED_GLM_CONFIG = {
    "model_type": "glm",
    "attention_bias": True,
    "rope_parameters": ROTARY,
    "tie_word_embeddings": False,
}
MAX_LAYERS = 10_000  # a corrupt number must not make us list the tensors of 10^9 layers


def read_config(folder: Path) -> dict[str, Any]:
    """Read and validate the config.json of a ChatGLM3 folder.

    Raises DataError if it is missing or damaged, and for other architectures.
    """
    path = folder / "config.json"
    return _check_config(path, _read(path, "expected a ChatGLM3 checkpoint folder"))


def _read(path: Path, expected: str) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path} not found: {expected}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None


def _check_config(path: Path, config: Any) -> dict[str, Any]:
    _check_architecture(path, config, REQUIRED_CONFIG, "this is not a ChatGLM3-6B model")
    if "rope_ratio" in config and config["rope_ratio"] != 1:
        raise DataError(
            f"{path}: rope_ratio is {config['rope_ratio']!r}: the long-context variants are not "
            "supported, and GLM-4 only in transformers' layout (-hf); expected chatglm3-6b or "
            "chatglm3-6b-base"
        )
    # ChatGLM2's config.json is otherwise the same, but its prompt format differs.
    if "chatglm2" in str(config.get("_name_or_path", "")).lower():
        raise DataError(
            f"{path} is a ChatGLM2 configuration ({config['_name_or_path']}): expected chatglm3-6b "
            "or chatglm3-6b-base"
        )
    if config.get("quantization_bit") or config.get("quantization_config"):
        raise DataError(
            f"{path}: the checkpoint is quantized; expected fp16, bf16 or fp32 weights: download "
            "chatglm3-6b or chatglm3-6b-base"
        )
    _check_sizes(path, config, SIZES)
    return config


def read_glm_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder of step 3, 5 or 6 as what ChatGLM3's would hold.

    Raises DataError if it is missing or damaged, and for other architectures.
    """
    path = folder / "config.json"
    expected = "expected a model of step 3, 5 or 6"
    config = _read(path, expected)
    _check_architecture(path, config, REQUIRED_GLM_CONFIG, expected)
    _check_sizes(path, config, SIZES.values())
    return REQUIRED_CONFIG | {name: config[glm_name] for name, glm_name in SIZES.items()}


def _check_architecture(path: Path, config: Any, required: Mapping[str, Any], meaning: str) -> None:
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object: expected a ChatGLM3 config.json")
    for name, expected in required.items():
        if config.get(name) != expected:
            raise DataError(
                f"{path}: {name} is {config.get(name)!r}, expected {expected!r}: {meaning}"
            )


def _check_sizes(path: Path, config: Mapping[str, Any], names: Collection[str]) -> None:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: expected a ChatGLM3 config.json")
    wrong = [f"{name} is {config[name]!r}" for name in names if not _is_size(name, config[name])]
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong)}: expected the sizes of a ChatGLM3 model")


def _is_size(name: str, value: Any) -> bool:
    if name in ("layernorm_epsilon", SIZES["layernorm_epsilon"]):
        return isinstance(value, float) and 0 < value < 1
    limit = MAX_LAYERS if name in ("num_layers", SIZES["num_layers"]) else 2**31 - 1
    return type(value) is int and 0 < value <= limit


def glm_config(config: Mapping[str, Any], vocab_size: int, dtype: "torch.dtype | None") -> Any:
    """Return the GlmConfig of a ChatGLM3 config.json, with `vocab_size` embedding rows."""
    from transformers import GlmConfig

    sizes = {glm_name: config[name] for name, glm_name in SIZES.items()}
    return GlmConfig(
        **{**sizes, "vocab_size": vocab_size},
        architectures=["GlmForCausalLM"],
        attention_bias=True,
        rope_parameters=dict(ROTARY),
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )
