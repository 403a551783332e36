"""A model folder as seen without torch: config.json, sizes, layout, weight files, fingerprints.

Nothing here imports torch, so that a step can look at its inputs before it loads anything.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ja.errors import ArtifactError, DataError
from chatglm_ja.storage.files import describe_absence, digest, read_json
from chatglm_ja.storage.inputs import Input, open_artifact, open_files
from chatglm_ja.storage.manifest import read_manifest
from chatglm_ja.storage.recognition import recognize_folder
from chatglm_ja.storage.weight_files import find_weights

if TYPE_CHECKING:  # torch takes a second to import, and --help needs this module
    import torch

# The error of a step whose base model nobody has named.
NO_BASE_MODEL = (
    "CHATGLM3_6B_DIR is not set: set it to the folder of the downloaded ChatGLM3-6B, or pass "
    "--base-model"
)
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
            f"{path}: rope_ratio is {config['rope_ratio']!r}: the long-context variants and GLM-4 "
            "are not supported; expected chatglm3-6b or chatglm3-6b-base"
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


def glm_config(config: Mapping[str, Any], vocab_size: int, dtype: "torch.dtype") -> Any:
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


def is_base(folder: Path) -> bool:
    """Return whether a folder is in ChatGLM3's layout."""
    return read_json(folder / "config.json")["model_type"] == REQUIRED_CONFIG["model_type"]


def open_base_tokenizer(folder: Path) -> Input:
    """Fingerprint the tokenizer of a ChatGLM3 folder, which must have a config.json as well."""
    _refuse_strange(folder)
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "not found"
        if folder.is_file():
            found = "is a file, expected the folder of the model"
        raise ArtifactError(
            f"base model {folder.absolute()} {found}: for the demo, run demo/build_base_model.py; "
            "for the real model, set CHATGLM_JA_PROFILE=chatglm3-6b, and CHATGLM3_6B_DIR to its "
            "folder"
        )
    return open_files("base_tokenizer", folder / MODEL_FILE)


def _refuse_strange(folder: Path) -> None:
    """Raise ArtifactError for a folder without config.json of which it is known what it is."""
    path = folder / "config.json"
    if path.exists():
        return
    if path.is_symlink():
        raise ArtifactError(f"base model: {path} {describe_absence(path)}: restore it")
    if found := recognize_folder(folder):
        raise ArtifactError(f"base model {folder} has no config.json, but {found}")


def open_base_model(folder: Path, merged: Path | None = None) -> list[Input]:
    """Fingerprint a ChatGLM3 folder: its tokenizer, and its configuration and weights.

    `merged` is step 2's output, if it is an input beside this one. A folder whose tokenizer is that
    of `merged`, byte for byte, as step 8 writes it, brings no other: the one that `merged` was made
    from counts.
    """
    tokenizers = [open_base_tokenizer(folder)]
    own = merged / MODEL_FILE if merged is not None else None
    if own and own.is_file() and digest(own) == digest(folder / MODEL_FILE):
        tokenizers = []
    weights = find_weights(folder)
    return [*tokenizers, open_files("base_model", folder / "config.json", *weights)]


def open_model(folder: Path, *scripts: str, every_byte: bool | None = None) -> Input:
    """Open a model in GlmForCausalLM's layout that one of the steps published, or that was trained
    further by another program: then by its files.
    """
    if read_manifest(folder) is None and (folder / "config.json").is_file():
        paths = (folder / "config.json", folder / MODEL_FILE, *find_weights(folder))
        return open_files("model", *paths)
    return open_artifact(folder, *scripts, every_byte=every_byte)
