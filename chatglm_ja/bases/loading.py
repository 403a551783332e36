"""Model folders of steps 3, 5 and 6 as transformers' models, of whatever architecture.

Two things are asked of an architecture, and checked on the loaded model: its logits are the product
of the output matrix and the last hidden states, and position ids that restart keep attention inside
documents.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json

# The progress bars over a checkpoint's shards; the log names the model that is loaded.
transformers.utils.logging.disable_progress_bar()

CPU = torch.device("cpu")
Logits = tuple[torch.Tensor, torch.Tensor]


def load_model(
    folder: Path,
    dtype: torch.dtype | str,
    device: torch.device = CPU,
    mixin: type | None = None,
) -> Any:
    """Load a model folder of step 3, 5 or 6 on `device`, as the class that its config.json names.

    `mixin`, if given, comes before that class. The weights go to the device one by one from the
    files, which are mapped into memory. With the dtype "auto", that of the files, processes that
    load the same model share the host's memory. Raises DataError for a folder in ChatGLM3's own
    layout.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = folder / "config.json"
    try:
        model_type = read_json(path)["model_type"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: expected that of a model of step 3, 5 or 6") from None
    if model_type == "chatglm":
        raise DataError(
            f"{folder} is in the layout of {model_type}, for other tools: run "
            "step3_resize_model.py with it as --base-model for the steps that follow"
        )
    config = AutoConfig.from_pretrained(folder)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if mixin is not None:
        model_class = type(model_class.__name__, (mixin, model_class), {})
    return model_class.from_pretrained(folder, config=config, dtype=dtype, device_map=device)


@torch.inference_mode()
def check_training(model: Any, folder: Path) -> None:
    """Raise DataError if a model of `folder` computes otherwise than training takes it to.

    A few tokens show it: its own logits differ, bit by bit or by rounding, from the product that
    the loss is computed from (Gemma 2 caps them, Cohere and Granite scale them, Phi-2 adds a bias);
    or a document changes with the one before it (ALiBi's biases and recurrent states know no
    position ids).
    """
    problem = ""
    head = model.get_output_embeddings()
    ids = torch.arange(2 * 8, device=model.device).view(2, 8)
    ids[:, 4:] = ids[0, 4:]  # two rows with the same second document
    positions = torch.arange(4, device=model.device).repeat(2, 2)
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        problem = "takes no position ids, so attention would cross the documents of a packed row"
    else:
        hidden = model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).last_hidden_state
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        if not _agree(logits, F.linear(hidden, head.weight)):
            problem = "computes logits that are not its output matrix times the last hidden state"
        elif not _agree(hidden[0, 4:], hidden[1, 4:]):
            problem = "ignores position ids: attention would cross the documents of a packed row"
    if problem:
        raise DataError(
            f"{folder} cannot be trained: {type(model).__name__} {problem}; give another base"
        )


def _agree(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors are equal but for rounding, relative to the largest number.

    So they are if one has a NaN, which tells nothing about the architecture.
    """
    difference = (first - second).abs().max() / first.abs().max()
    return not bool(difference > 2 * torch.finfo(first.dtype).eps)


def compute_dtype() -> torch.dtype:
    """Return the dtype to compute in: bfloat16 or float16 by what the GPU has, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


@torch.inference_mode()
def compute_logits(model: Any, prompts: Sequence[Sequence[int]], rows: int) -> list[Logits]:
    """Compute logits after every token of each prompt.

    Returns for each prompt the logits of the first `rows` ids, [length, rows], and the logsumexp
    over all ids, [length]. The former come from the first `rows` rows of the output matrix alone,
    because a matrix of another size may be multiplied in another order: two models that agree on
    those rows then agree on every bit.
    """
    weight = model.get_output_embeddings().weight
    logits = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        state = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        total = (state @ weight.T).float().logsumexp(dim=-1)
        logits.append(((state @ weight[:rows].T).cpu(), total.cpu()))
    return logits
