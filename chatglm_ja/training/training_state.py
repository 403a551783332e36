"""What a training run knows beside its frozen weights, in a form that any number of processes read.

Trained weights and Adam's moments are saved by the parameter's name, in full and in float32:
under DeepSpeed ZeRO-2 every process holds a part of them, which is put together here, and taken
apart again when a run is resumed, by as many processes as there are then.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from chatglm_ja.training import costs

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS, OPTIMIZER, RANDOM = "weights.safetensors", "optimizer.safetensors", "random.safetensors"
TRAINER_STATE, PROGRESS = "trainer_state.json", "progress.json"


def save_state(trainer: Any, folder: Path | None, more: Mapping[str, Any]) -> None:
    """Write the state of a Trainer into `folder`; all processes call this, one gives a folder.

    `more` goes into the progress that `load` returns.
    """
    _link_moments(trainer)
    for file, keys in ((WEIGHTS, ("",)), (OPTIMIZER, MOMENTS)):
        tensors = {}
        for name, parameter in _trained(trainer):
            for key in keys:
                value = _full(trainer, parameter, key)
                if folder is not None:
                    tensors[f"{name}:{key}" if key else name] = value.cpu().contiguous()
        if folder is not None:
            save_file(tensors, folder / file)
        del tensors
    states = _random_states(trainer)
    if folder is None:
        return
    save_file(states, folder / RANDOM)
    trainer.state.save_to_json(str(folder / TRAINER_STATE))
    scaler = getattr(trainer.accelerator, "scaler", None)
    progress = {
        "optimizer_step": _optimizer_step(trainer),
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        # The sum of the losses since the last log line, and the step of that line.
        "loss_sum": trainer._tr_loss.item(),
        "last_logged": trainer._globalstep_last_logged,
        **more,
    }
    (folder / PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")


def state_bytes(trainer: Any) -> int:
    """About how many bytes `save` writes."""
    return costs.CHECKPOINT_BYTES * sum(parameter.numel() for _, parameter in _trained(trainer))


def trained_weights(trainer: Any, wanted: bool) -> dict[str, torch.Tensor]:
    """What is trained, by the parameter's name, whole and in float32 on the CPU.

    All processes call this; those that do not want the weights get none.
    """
    found = {}
    for name, parameter in _trained(trainer):
        value = _full(trainer, parameter, "")
        if wanted:
            found[name] = value.cpu()
    return found


def set_weights(trainer: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Put float32 weights in place of those that training starts from; all processes call this."""
    for name, parameter in _trained(trainer):
        if name in values:
            _put(trainer, parameter, "", values[name])


def load_state(trainer: Any, folder: Path) -> dict[str, Any]:
    """Put a saved state into a Trainer whose model and optimizer are prepared; returns progress."""
    progress = dict(json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    weights = load_file(folder / WEIGHTS)
    moments = load_file(folder / OPTIMIZER)
    _make_moments(trainer, progress["optimizer_step"])
    _link_moments(trainer)
    for name, parameter in _trained(trainer):
        _put(trainer, parameter, "", weights[name])
        for key in MOMENTS:
            _put(trainer, parameter, key, moments[f"{name}:{key}"])
    trainer.lr_scheduler.load_state_dict(progress["schedule"])
    for group, rate in zip(
        trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True
    ):
        group["lr"] = rate
    if progress["scaler"]:
        trainer.accelerator.scaler.load_state_dict(progress["scaler"])
    return progress


def load_random_states(trainer: Any, folder: Path) -> None:
    """Restore this process's random generators, if there was a process of its number."""
    states = load_file(folder / RANDOM)
    rank = trainer.args.process_index
    if f"{rank}.cpu" in states:
        torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])


def _random_states(trainer: Any) -> dict[str, torch.Tensor]:
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    everyone: list[Any] = [mine]
    if trainer.args.world_size > 1:
        everyone = [None] * trainer.args.world_size
        torch.distributed.all_gather_object(everyone, mine)
    return {f"{rank}.{kind}": s for rank, own in enumerate(everyone) for kind, s in own.items()}


def _trained(trainer: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _full(trainer: Any, parameter: Any, key: str) -> torch.Tensor:
    """A trained weight (key "") or a moment of it, whole, in float32."""
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key:
            return safe_get_full_optimizer_state(parameter, key)
        return safe_get_full_fp32_param(parameter)
    value = trainer.optimizer.optimizer.state[parameter][key] if key else parameter.detach()
    return value.float()


def _put(trainer: Any, parameter: Any, key: str, value: torch.Tensor) -> None:
    value = value.to(parameter.device)
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        safe_set_full_fp32_param(parameter, value)
    if key:
        trainer.optimizer.optimizer.state[parameter][key].copy_(value)
    else:
        parameter.data.copy_(value)


def _adam(trainer: Any) -> torch.optim.Optimizer:
    """The AdamW itself, below what accelerate and DeepSpeed put around it."""
    optimizer = trainer.optimizer.optimizer
    return optimizer.optimizer if trainer.is_deepspeed_enabled else optimizer


def _optimizer_step(trainer: Any) -> int:
    return int(next(iter(_adam(trainer).state.values()))["step"])


def _make_moments(trainer: Any, step: int) -> None:
    """The state that AdamW makes at its first step, to be filled: moments of zero."""
    adam = _adam(trainer)
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{key: torch.zeros_like(parameter) for key in MOMENTS},
            }


def _link_moments(trainer: Any) -> None:
    """Let DeepSpeed find a parameter's moments, which lie in partitions of its flat groups.

    It links them itself when the first of the groups has made a step, and so those of that group
    only: the moments of the others are not there yet.
    """
    if trainer.is_deepspeed_enabled:
        zero = trainer.optimizer.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
