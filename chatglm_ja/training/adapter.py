"""What a run trains: LoRA matrices in every layer, and the embeddings in full or their new rows.

`load_for_training` builds the model; `save_adapter` writes what was trained in PEFT's format. The
two embedding matrices are trained in place: PEFT's `modules_to_save` would keep a frozen second
copy of both.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from chatglm_ja.chatglm3 import base_config, chat_format
from chatglm_ja.chatglm3.tensor_names import GLM_EMBEDDING, GLM_LM_HEAD
from chatglm_ja.chatglm3.tokenizer import load_processor
from chatglm_ja.chatglm3.weights import compute_dtype, load_glm, read_tensor
from chatglm_ja.errors import ConfigError
from chatglm_ja.training import new_rows
from chatglm_ja.training.merge_lora import PEFT_PREFIX
from chatglm_ja.training.model import GlmForTraining
from chatglm_ja.training.settings import TrainingConfig

log = logging.getLogger(__name__)

# Endings of the embeddings' parameter names: of whole matrices, and of their new rows only.
EMBEDDINGS = tuple(
    name.removesuffix("weight") + part
    for name in (GLM_EMBEDDING, GLM_LM_HEAD)
    for part in ("weight", "new")
)


def choose_dtype(config: TrainingConfig) -> torch.dtype:
    """Return the dtype of the frozen weights and of the computation."""
    if config.precision == "auto":
        return compute_dtype()
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]


def load_for_training(config: TrainingConfig, dtype: torch.dtype) -> PeftModel:
    """Load the model with LoRA matrices, and with trainable embeddings if the settings say so.

    Trained weights are float32 (DeepSpeed makes them half precision, with float32 masters); frozen
    ones have `dtype`.
    """
    log.info("loading %s", config.model)
    model: Any = load_glm(config.model, GlmForTraining, dtype)
    if config.embedding_rows == "new":
        new_rows.split_embeddings(model, chat_format.first_new_id(load_processor(config.model)))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(base_config.read_shape(config.model).projections),
    )
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if name.endswith(EMBEDDINGS):
            parameter.requires_grad_(config.train_embeddings)
        elif config.learning_rate == 0:
            parameter.requires_grad_(False)
    for name, rows in read_embeddings(config.model, model):
        model.get_parameter(name).data = rows
    for module in model.modules():
        # Otherwise LoRA layers copy their inputs to float32, and autocast converts them back.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    if config.compile:
        # Layer by layer: all layers are alike, so they share one compilation.
        for layer in model.get_base_model().model.layers:
            layer.compile()
    return model


def read_embeddings(folder: Path, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the stored values of the embeddings that `model` trains, in float32, by parameter name.

    The values in a loaded model are rounded to the dtype of the computation.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(EMBEDDINGS) and parameter.requires_grad:
            stored = name.removeprefix(PEFT_PREFIX).removesuffix(".new").removesuffix(".weight")
            yield name, read_tensor(folder, f"{stored}.weight")[-len(parameter) :].float()


def save_adapter(
    config: TrainingConfig, model: Any, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write the trained `weights`, float32 by parameter name, to `folder` in PEFT's format.

    They replace those in `model`, which DeepSpeed rounds to half precision.
    """
    for name, value in weights.items():
        model.get_parameter(name).data = value
    if config.embedding_rows == "new":
        stored = (read_tensor(config.model, name) for name in (GLM_EMBEDDING, GLM_LM_HEAD))
        new_rows.join_embeddings(model.get_base_model(), *stored)
    # Only the folder's name: its path on this machine means nothing elsewhere.
    model.peft_config["default"].base_model_name_or_path = config.model.resolve().name
    model.save_pretrained(folder, save_embedding_layers=config.train_embeddings)
    (folder / "README.md").unlink()  # PEFT's template of a model card, not filled in
