"""ChatGLM3's checkpoint layout read as transformers' own `GlmForCausalLM`, tensor by tensor.

The two are one architecture under different names: ChatGLM3 stores the query, key and value
projections as one matrix (all query heads, then the key groups, then the value groups) and names
its modules differently; nothing is computed. Tensors stream from the input shards to the output
shards, so memory holds one tensor and one output shard, whatever the model's size.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chatglm_ja.base_config import read_config
from chatglm_ja.errors import DataError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A buffer in ChatGLM3's files that follows from the configuration; not a weight.
IGNORED = ("transformer.rotary_pos_emb.inv_freq",)

EMBEDDING = "transformer.embedding.word_embeddings.weight"
OUTPUT_LAYER = "transformer.output_layer.weight"
GLM_EMBEDDING = "model.embed_tokens.weight"
GLM_LM_HEAD = "lm_head.weight"

NAMES = {
    EMBEDDING: GLM_EMBEDDING,
    OUTPUT_LAYER: GLM_LM_HEAD,
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
LAYER_PREFIX = "transformer.encoder.layers."
FUSED_QKV = "self_attention.query_key_value."


def glm_config(config: dict[str, Any], vocab_size: int, dtype: torch.dtype) -> Any:
    """The same model's GlmConfig, with `vocab_size` embedding rows."""
    from transformers import GlmConfig

    return GlmConfig(
        architectures=["GlmForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["multi_query_group_num"],
        head_dim=config["kv_channels"],
        rms_norm_eps=config["layernorm_epsilon"],
        max_position_embeddings=config["seq_length"],
        attention_bias=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a ChatGLM3 checkpoint."""
    hidden, ffn = config["hidden_size"], config["ffn_hidden_size"]
    query = config["num_attention_heads"] * config["kv_channels"]
    fused = query + 2 * config["multi_query_group_num"] * config["kv_channels"]
    rows = (config["padded_vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: rows,
        OUTPUT_LAYER: rows,
        "transformer.encoder.final_layernorm.weight": (hidden,),
    }
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


class Checkpoint:
    """A ChatGLM3 checkpoint folder: checked as a whole on opening, read one tensor at a time.

    Raises DataError when a shard or a tensor is missing, left over, truncated, or has a shape
    other than config.json's sizes give.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._shard_of = self._read_index()
        shapes = expected_shapes(self.config)
        missing = sorted(shapes.keys() - self._shard_of.keys())
        extra = sorted(self._shard_of.keys() - shapes.keys() - set(IGNORED))
        if missing or extra:
            problem = f"has no tensor {missing[0]}" if missing else f"has a tensor {extra[0]}"
            raise DataError(f"{folder} {problem}: its config.json describes another model")
        self.dtype = self._check_tensors(shapes)

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._path(name), framework="pt") as shard:
            return shard.get_tensor(name)

    def glm_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors under GlmForCausalLM's names and in its shapes, embeddings unchanged.

        The order is the shards' order, so that each is read once from front to back.
        """
        for name in sorted(self._shard_of, key=lambda name: (str(self._path(name)), name)):
            if name in IGNORED:
                continue
            tensor = self.tensor(name)
            if name in NAMES:
                yield NAMES[name], tensor
                continue
            index, _, part = name.removeprefix(LAYER_PREFIX).partition(".")
            target = f"model.layers.{index}."
            if part in LAYER_NAMES:
                yield target + LAYER_NAMES[part], tensor
                continue
            kind = part.removeprefix(FUSED_QKV)
            keys = self.config["multi_query_group_num"] * self.config["kv_channels"]
            query = tensor.shape[0] - 2 * keys
            for letter, rows in zip("qkv", tensor.split([query, keys, keys]), strict=True):
                yield f"{target}self_attn.{letter}_proj.{kind}", rows.contiguous()

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            try:
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{index} is not a safetensors index") from None
        if (self.folder / SINGLE_FILE).is_file():
            with _open_shard(self.folder / SINGLE_FILE) as shard:
                return dict.fromkeys(shard.keys(), SINGLE_FILE)
        raise DataError(
            f"{self.folder} has neither {INDEX_FILE} nor {SINGLE_FILE}: expected ChatGLM3's "
            "weights as safetensors"
        )

    def _path(self, name: str) -> Path:
        return self.folder / self._shard_of[name]

    def _check_tensors(self, shapes: dict[str, tuple[int, ...]]) -> torch.dtype:
        dtypes = set()
        for shard_name in sorted(set(self._shard_of.values())):
            path = self.folder / shard_name
            if Path(shard_name).name != shard_name:
                raise DataError(f"{INDEX_FILE} names {shard_name!r}, which is not a plain file")
            if not path.is_file():
                raise DataError(f"{path} not found, but {INDEX_FILE} names it: download it again")
            with _open_shard(path) as shard:
                stored = set(shard.keys())
                for name in (n for n, s in self._shard_of.items() if s == shard_name):
                    if name not in stored:
                        raise DataError(f"{path} lacks {name}, which {INDEX_FILE} places there")
                    if name in IGNORED:
                        continue
                    view = shard.get_slice(name)
                    dtypes.add(view.get_dtype())
                    if tuple(view.get_shape()) != shapes[name]:
                        raise DataError(
                            f"{path}: {name} has shape {tuple(view.get_shape())}, but config.json "
                            f"gives {shapes[name]}"
                        )
        known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        if len(dtypes) != 1 or not dtypes <= known.keys():
            found = ", ".join(sorted(dtypes))
            raise DataError(f"{self.folder} holds {found}: expected one of F16, BF16, F32")
        return known[dtypes.pop()]


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{path} is truncated or damaged ({error}): download it again") from None


def write_sharded(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int
) -> None:
    """Write named tensors as safetensors shards with an index, in the order they come.

    A shard is closed before the tensor that would take it over `max_shard_bytes`.
    """
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a folder that `write_sharded` wrote."""
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    with safe_open(folder / index["weight_map"][name], framework="pt") as shard:
        return shard.get_tensor(name)


def load_base(folder: Path, dtype: torch.dtype) -> Any:
    """A ChatGLM3 checkpoint as a GlmForCausalLM in memory, in evaluation mode."""
    from transformers import GlmForCausalLM

    base = Checkpoint(folder)
    config = glm_config(base.config, base.config["padded_vocab_size"], dtype)
    with torch.device("meta"):
        model: Any = GlmForCausalLM(config)
    # Buffers (the rotary frequencies) are computed, not stored: take them from a fresh module.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    # Assigned, not copied: the weights are in memory once.
    state = {name: tensor.to(dtype) for name, tensor in base.glm_tensors()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def chatglm_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A GlmForCausalLM's tensors under ChatGLM3's names, query, key and value fused again."""
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
