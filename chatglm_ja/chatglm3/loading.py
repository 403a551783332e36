"""A model folder loaded into memory as transformers' GlmForCausalLM, and its logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from chatglm_ja.chatglm3.base_config import glm_config
from chatglm_ja.chatglm3.weights import BaseWeights
from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json


def load_base(base: BaseWeights, dtype: torch.dtype) -> Any:
    """Load the weights of a ChatGLM3 folder as a GlmForCausalLM, in evaluation mode."""
    from transformers import GlmForCausalLM

    config = glm_config(base.config, base.config["padded_vocab_size"], dtype)
    with torch.device("meta"):
        model: Any = GlmForCausalLM(config)
    # Buffers (the rotary frequencies) are computed, not stored: take them from a fresh module.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    # Assigned instead of copied, so that memory holds the weights once.
    state = {name: tensor.to(dtype) for name, tensor in base.glm_tensors()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_glm(folder: Path, model_class: Any, dtype: torch.dtype | str) -> Any:
    """Load a model folder of steps 3, 5 or 6 as GlmForCausalLM or a subclass.

    Raises DataError for a folder in ChatGLM3's own layout.
    """
    path = folder / "config.json"
    try:
        model_type = read_json(path)["model_type"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: expected that of a model of step 3, 5 or 6") from None
    if model_type != "glm":
        raise DataError(
            f"{folder} is in the layout of {model_type}, for other tools: run "
            "step3_resize_model.py with --layout glm for the steps that follow"
        )
    return model_class.from_pretrained(folder, dtype=dtype)


def compute_dtype() -> torch.dtype:
    """Return the dtype to compute in: bfloat16 or float16 by what the GPU has, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


Logits = tuple[torch.Tensor, torch.Tensor]


@torch.inference_mode()
def compute_logits(model: Any, prompts: Sequence[Sequence[int]], rows: int) -> list[Logits]:
    """Compute logits after every token of each prompt.

    Returns for each prompt the logits of the first `rows` ids, [length, rows], and the logsumexp
    over all ids, [length]. The former come from the first `rows` rows of the output matrix alone,
    because a matrix of another size may be multiplied in another order: two models that agree on
    those rows then agree on every bit.
    """
    weight = model.lm_head.weight
    logits = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        state = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        total = (state @ weight.T).float().logsumexp(dim=-1)
        logits.append(((state @ weight[:rows].T).cpu(), total.cpu()))
    return logits
