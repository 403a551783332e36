"""AdamW of what is trained: LoRA matrices, and embeddings at a rate of their own.

With 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861), 256 neighbouring numbers share a
float32 scale, and each has a code for a number between -1 and 1. The implementation is torchao's.
It compiles one kernel for each shape, so that moments in float32 never exist in memory.
"""

import warnings
from typing import Any

import torch

from chatglm_ja.training.adapter import trained_embeddings
from chatglm_ja.training.settings import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS = (0.9, 0.95)


def make_optimizer(config: TrainingConfig, model: Any) -> torch.optim.Optimizer:
    """Return AdamW with two parameter groups: LoRA matrices, and embeddings."""
    embeddings = list(trained_embeddings(model.get_base_model()).values())
    known = {id(parameter) for parameter in embeddings}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lora = [parameter for parameter in trained if id(parameter) not in known]
    groups: list[dict[str, Any]] = [
        {"params": lora, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        # No decay: it would shrink the rows of tokens that do not occur in a batch.
        {"params": embeddings, "lr": config.embedding_learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, fused=True)
    # Its state lacks a hash, which only the cache of compiled kernels would use.
    warnings.filterwarnings("ignore", "OptimState8bit does not implement")
    from torchao.optim import AdamW8bit

    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, betas=BETAS)
    return eight_bit


def skip_step_if(wrapped: Any, is_bad: torch.Tensor) -> None:
    """Let the optimizer leave weights and moments as they are in its next step, if `is_bad`.

    `wrapped` is accelerate's optimizer. AdamW reads `found_inf` on the device, which a GradScaler
    sets as well. For 8-bit moments the host has to wait for the answer.
    """
    if wrapped.optimizer.defaults.get("fused"):
        wrapped.optimizer.found_inf = is_bad.float()
    elif is_bad:
        wrapped.zero_grad(set_to_none=True)


def create_state(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Create what AdamW creates in its first step; its moments are zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            steps = torch.tensor(float(step))
            if make_zeros := getattr(optimizer, "_new_buffer", None):  # torchao's
                zeros = [make_zeros(parameter, signed) for signed in (True, False)]
            else:
                steps = steps.to(parameter.device)
                zeros = [torch.zeros_like(parameter) for _ in MOMENTS]
            optimizer.state[parameter] = {"step": steps, **dict(zip(MOMENTS, zeros, strict=True))}


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors that hold a parameter's moments: by moment or, in 8 bits, by part of it.

    torchao leaves a small tensor's moments in float32.
    """
    parts: dict[str, torch.Tensor] = {}
    for key in MOMENTS:
        moment = optimizer.state[parameter][key]
        if hasattr(moment, "codes"):
            parts |= {f"{key}.codes": moment.codes, f"{key}.scale": moment.scale}
        else:
            parts[key] = moment
    return parts
