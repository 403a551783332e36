"""A model as one GGUF file, some rows of a tensor at a time, so that memory holds little of it.

The header comes first and lists all tensors with their sizes, which follow from config.json alone.
Matrices have the chosen dtype; norms and biases are float32, as llama.cpp computes with them.
Embedding rows after the last token are left out, because llama.cpp takes one token for each row.

llama.cpp calls the architecture chatglm. Its rotary embedding pairs neighboring dimensions, as
ChatGLM3 and GlmForCausalLM do, so that no matrix has to be permuted.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from chatglm_ja.chatglm3 import tensor_names
from chatglm_ja.chatglm3.base_config import ROTARY
from chatglm_ja.chatglm3.chat_format import SAMPLING
from chatglm_ja.chatglm3.tokenizer import BOS_ID, EOS_ID, UNK_ID
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.export import gguf_tokenizer
from chatglm_ja.export.model_folder import ModelFolder

log = logging.getLogger(__name__)

MODELFILE = "Modelfile"
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
BLOCK = 32  # weights of a row that share a scale in q8_0
MAX_Q8_0 = 127 * torch.finfo(torch.float16).max  # the scale is a float16
ROWS = 4096  # of a matrix, converted at once
# GlmForCausalLM's names of tensors -> llama.cpp's.
NAMES = {
    tensor_names.GLM_EMBEDDING: "token_embd.weight",
    tensor_names.GLM_LM_HEAD: "output.weight",
    "model.norm.weight": "output_norm.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def require_gguf() -> None:
    """Raise ConfigError if the package that writes the files is not installed."""
    try:
        from gguf import GGUFWriter  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--to gguf needs the package gguf: run `pip install -r requirements-extras.txt`"
        ) from None


def write_gguf(model: ModelFolder, dtype: str | None, folder: Path) -> dict[str, Any]:
    """Write a GGUF file, and beside it a Modelfile for Ollama; return name and numbers of the file.

    `dtype` is that of the matrices: f32, f16, bf16, q8_0, or None for the stored one. Raises
    DataError if a weight is too large for it.
    """
    import gguf

    dtype = dtype or DTYPES[model.weights.dtype]
    path = folder / f"model-{dtype.upper()}.gguf"
    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer: Any = gguf.GGUFWriter(path, "chatglm")
    _describe(writer, model, dtype)
    tensors = _plan(model, dtype)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.dtype.upper()]
        bytes_shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        size = math.prod(bytes_shape)
        writer.add_tensor_info(tensor.target, bytes_shape, np.dtype(np.uint8), size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        # Not writer.write_tensor_data, which takes whole tensors.
        writer.write_padding(file, file.tell())
        for tensor in tqdm(tensors, desc="writing", unit=" tensors"):
            weights = model.weights.tensor(tensor.name)[: tensor.shape[0]]
            written = sum(file.write(part.data) for part in _encode(weights, tensor, model.folder))
            writer.write_padding(file, written)
    finally:
        writer.close()
    text = gguf_tokenizer.write_modelfile(model.proto, path.name)
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    return {"file": path.name, "dtype": dtype, "tokens": len(model.proto.pieces)}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: its name in the model and in the file, its shape and dtype there."""

    name: str
    target: str
    shape: tuple[int, ...]
    dtype: str


def _plan(model: ModelFolder, dtype: str) -> list[_Tensor]:
    """Return all tensors, in an order that opens each of the model's shards once."""
    shapes = tensor_names.glm_shapes(model.config)
    tensors = []
    for name in sorted(shapes, key=model.weights.place):
        shape, kind = shapes[name], dtype
        if name in NAMES:
            target = NAMES[name]
            shape = (min(shape[0], len(model.proto.pieces)), shape[1]) if shape[1:] else shape
        else:
            index, _, part = name.removeprefix("model.layers.").partition(".")
            module, _, parameter = part.rpartition(".")
            target = f"blk.{index}.{LAYER_NAMES[module]}.{parameter}"
        if len(shape) == 1:
            kind = "f32"
        elif kind == "q8_0" and shape[-1] % BLOCK:
            kind = "f16"
        tensors.append(_Tensor(name, target, shape, kind))
    return tensors


def _encode(weights: torch.Tensor, tensor: _Tensor, folder: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor in its dtype, some rows at a time.

    Raises DataError for NaN and infinity, also for those that the dtype would make.
    """
    import gguf

    for rows in weights.split(ROWS):
        if not rows.isfinite().all():
            raise DataError(
                f"{folder}: {tensor.name} holds NaN or infinity: the model is damaged, make it "
                "again"
            )
        if tensor.dtype == "q8_0":
            fits = rows.abs().max() <= MAX_Q8_0
            encoded = gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        else:
            (dtype,) = (dtype for dtype, name in DTYPES.items() if name == tensor.dtype)
            cast = rows.to(dtype)
            fits = cast.isfinite().all()
            encoded = cast.contiguous().view(torch.uint8).numpy()
        if not fits:
            raise DataError(
                f"{folder}: {tensor.name} has values that {tensor.dtype} cannot hold: choose "
                "another --dtype, such as bf16"
            )
        yield encoded


def _describe(writer: Any, model: ModelFolder, dtype: str) -> None:
    """Add the metadata: sizes, tokenizer, chat template, sampling settings."""
    import gguf

    config, proto, ids = model.config, model.proto, model.ids
    file_type = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_name(model.folder.absolute().name)
    writer.add_sampling_temp(SAMPLING["temperature"])
    writer.add_sampling_top_p(SAMPLING["top_p"])
    writer.add_sampling_top_k(SAMPLING["top_k"])
    writer.add_context_length(config["seq_length"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["ffn_hidden_size"])
    writer.add_block_count(config["num_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["multi_query_group_num"])
    writer.add_key_length(config["kv_channels"])
    writer.add_value_length(config["kv_channels"])
    writer.add_layer_norm_rms_eps(config["layernorm_epsilon"])
    writer.add_rope_dimension_count(int(config["kv_channels"] * ROTARY["partial_rotary_factor"]))
    writer.add_rope_freq_base(ROTARY["rope_theta"])

    writer.add_tokenizer_model("llama")  # sentencepiece's BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list(gguf_tokenizer.name_tokens(proto))
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])  # GGUF has the same numbers
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(False)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_unk_token_id(UNK_ID)
    writer.add_pad_token_id(UNK_ID)
    # Where the next turn begins: llama.cpp stops at both, as at </s>.
    writer.add_eot_token_id(ids["<|user|>"])
    writer.add_eom_token_id(ids["<|observation|>"])
    writer.add_chat_template(gguf_tokenizer.write_chat_template(proto))
