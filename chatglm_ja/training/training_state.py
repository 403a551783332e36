"""The state of a training run, in a form that any number of processes can load.

Trained weights and Adam's moments are saved by parameter name, in full and in float32. Under
DeepSpeed ZeRO-2 every process holds a shard of them: saving gathers the shards, and loading divides
them again among the processes of the resumed run.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from chatglm_ja.storage.files import read_json, write_json
from chatglm_ja.training import costs

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS, OPTIMIZER, RANDOM = "weights.safetensors", "optimizer.safetensors", "random.safetensors"
TRAINER_STATE, PROGRESS = "trainer_state.json", "progress.json"


def save_state(trainer: Any, folder: Path | None, extra: Mapping[str, Any]) -> None:
    """Write the state of a Trainer into `folder`; all processes call this, one gives a folder.

    `extra` is added to the progress that `load_state` returns.
    """
    _link_moments(trainer)
    for file, keys in ((WEIGHTS, ("",)), (OPTIMIZER, MOMENTS)):
        tensors = {}
        for name, parameter in _trained(trainer):
            for key in keys:
                value = _gather(trainer, parameter, key)
                if folder is not None:
                    tensors[f"{name}:{key}" if key else name] = value.cpu().contiguous()
        if folder is not None:
            save_file(tensors, folder / file)
        del tensors
    random_states = _gather_random_states(trainer)
    if folder is None:
        return
    save_file(random_states, folder / RANDOM)
    trainer.state.save_to_json(str(folder / TRAINER_STATE))
    scaler = getattr(trainer.accelerator, "scaler", None)
    progress = {
        "optimizer_step": int(next(iter(_adam(trainer).state.values()))["step"]),
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        # The sum of the losses since the last log line, and the step of that line.
        "loss_sum": trainer._tr_loss.item(),
        "last_logged": trainer._globalstep_last_logged,
        **extra,
    }
    write_json(folder / PROGRESS, progress)


def count_trained(trainer: Any) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for _, parameter in _trained(trainer))


def state_bytes(trainer: Any) -> int:
    """Estimate how many bytes `save_state` writes."""
    return costs.CHECKPOINT_BYTES * count_trained(trainer)


def trained_weights(trainer: Any, wanted: bool) -> dict[str, torch.Tensor]:
    """Return the trained weights by parameter name, in full, in float32 on the CPU.

    All processes call this; those that do not want the weights get none.
    """
    weights = {}
    for name, parameter in _trained(trainer):
        value = _gather(trainer, parameter, "")
        if wanted:
            weights[name] = value.cpu()
    return weights


def set_weights(trainer: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Overwrite trained weights with float32 values, by parameter name; all processes call this."""
    for name, parameter in _trained(trainer):
        if name in weights:
            _scatter(trainer, parameter, "", weights[name])


def load_state(trainer: Any, folder: Path) -> dict[str, Any]:
    """Load a saved state into a Trainer that is prepared for training; return its progress."""
    progress = dict(read_json(folder / PROGRESS))
    moments = load_file(folder / OPTIMIZER)
    adam = _adam(trainer)
    for group in adam.param_groups:
        for parameter in group["params"]:  # what AdamW creates in its first step
            adam.state[parameter] = {
                "step": torch.tensor(float(progress["optimizer_step"]), device=parameter.device),
                **{key: torch.zeros_like(parameter) for key in MOMENTS},
            }
    _link_moments(trainer)
    set_weights(trainer, load_file(folder / WEIGHTS))
    for name, parameter in _trained(trainer):
        for key in MOMENTS:
            _scatter(trainer, parameter, key, moments[f"{name}:{key}"])
    trainer.lr_scheduler.load_state_dict(progress["schedule"])
    rates = trainer.lr_scheduler.get_last_lr()
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if progress["scaler"]:
        trainer.accelerator.scaler.load_state_dict(progress["scaler"])
    return progress


def load_random_states(trainer: Any, folder: Path) -> None:
    """Restore this process's random generators, if the saved run had a process of its rank."""
    states = load_file(folder / RANDOM)
    rank = trainer.args.process_index
    if f"{rank}.cpu" in states:
        torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])


def _gather_random_states(trainer: Any) -> dict[str, torch.Tensor]:
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    by_rank: list[Any] = [own]
    if trainer.args.world_size > 1:
        by_rank = [None] * trainer.args.world_size
        torch.distributed.all_gather_object(by_rank, own)
    return {
        f"{rank}.{kind}": state
        for rank, states in enumerate(by_rank)
        for kind, state in states.items()
    }


def _trained(trainer: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _gather(trainer: Any, parameter: Any, key: str) -> torch.Tensor:
    """Return a trained weight (key "") or one of its moments, in full and in float32."""
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key:
            return safe_get_full_optimizer_state(parameter, key)
        return safe_get_full_fp32_param(parameter)
    value = _adam(trainer).state[parameter][key] if key else parameter.detach()
    return value.float()


def _scatter(trainer: Any, parameter: Any, key: str, value: torch.Tensor) -> None:
    """Set what `_gather` returns; every process keeps its shard."""
    value = value.to(parameter.device)
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_full_fp32_param(parameter, value)
    elif key:
        _adam(trainer).state[parameter][key].copy_(value)
    else:
        parameter.data.copy_(value)


def _adam(trainer: Any) -> torch.optim.Optimizer:
    """Return the AdamW inside the wrappers of accelerate and DeepSpeed."""
    optimizer = trainer.optimizer.optimizer
    return optimizer.optimizer if trainer.is_deepspeed_enabled else optimizer


def _link_moments(trainer: Any) -> None:
    """Let DeepSpeed find each parameter's moments, which are slices of its flat buffers.

    It links them itself in the first step of the first parameter group, when those of the other
    group do not exist yet.
    """
    if trainer.is_deepspeed_enabled:
        zero = trainer.optimizer.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
