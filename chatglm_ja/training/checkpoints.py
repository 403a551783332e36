"""Checkpoints of a training run: published atomically, pruned to a few, verified on opening.

    step5_pt.checkpoints/               beside the output folder, removed when that is published
      step-000200/
        weights.safetensors             trained weights, float32
        optimizer.safetensors           Adam's moments, float32 or 8-bit
        random.safetensors              states of the random generators of every process
        trainer_state.json              the Trainer's counters and log
        progress.json                   schedule, optimizer step, sums since the last log line
        manifest.json                   SHA-256 of the files, and the run they belong to
  step5_pt.before_decay/              such a checkpoint of the constant phase's last step; it stays

Any number of processes can load a checkpoint: weights and moments are saved by parameter name, in
full. Under DeepSpeed ZeRO-2 every process holds a shard of them; saving gathers the shards, and
loading divides them again.

The state is copied to host memory; a thread writes and hashes it while training goes on. Training
waits for it before it copies the next one, and at the end.

A run resumes from the newest intact checkpoint. A damaged one is skipped with a warning that says
what is wrong; nothing of it is loaded. It is renamed, and removed once there is a newer checkpoint.

A finished run can be given more data: another run starts with the weights and moments that it had
before its rates decayed, and goes on at constant rates (MiniCPM, arXiv 2404.06395).
"""

import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from chatglm_ja.errors import ArtifactError
from chatglm_ja.storage import disk, files
from chatglm_ja.storage.files import MANIFEST, FileRecord
from chatglm_ja.training import optimizer

log = logging.getLogger(__name__)

FOLDER_PREFIX = "step-"
DAMAGED = "damaged-"
WEIGHTS, OPTIMIZER, RANDOM = "weights.safetensors", "optimizer.safetensors", "random.safetensors"
TRAINER_STATE, PROGRESS = "trainer_state.json", "progress.json"
BEFORE_DECAY = ".before_decay"  # suffix of the folder, beside the run's output folder
# What the files of a checkpoint hold: tensors by name, or what becomes JSON.
State = Mapping[str, Any]


class CheckpointManifest(BaseModel):
    """The manifest of a checkpoint; `run` identifies the run it belongs to."""

    model_config = ConfigDict(strict=True)

    run: dict[str, Any]
    step: int
    files: dict[str, FileRecord]


class Checkpoints:
    """The checkpoints of one run in a folder, of which the last `keep` are kept.

    `run` identifies the run: settings, data, model. Checkpoints of two runs never share a folder.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], keep: int) -> None:
        self.folder = folder
        self.before_decay = folder.with_suffix(BEFORE_DECAY)
        self.run = json.loads(json.dumps(run, default=str))
        self.keep = keep
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None

    def find_newest(self, overwrite: bool) -> Path | None:
        """Return the newest intact checkpoint of this run, or None; warn about damaged ones.

        Raises ArtifactError for checkpoints of another run; `overwrite` removes them instead.
        """
        for path in self._newest_first():
            manifest, problem = _read(path)
            if manifest is not None and manifest.run != self.run:
                difference = _describe_difference(manifest.run, self.run)
                if not overwrite:
                    raise ArtifactError(
                        f"{self.folder} holds checkpoints of a run {difference}: use that run's "
                        "settings to resume it, or pass --overwrite to start again"
                    )
                log.info("removing %s: it belongs to a run %s", path, difference)
                shutil.rmtree(path)
            elif problem:
                log.warning("skipping the checkpoint %s: %s", path, problem)
                path.rename(_free_name(path.with_name(DAMAGED + path.name)))
            else:
                return path
        return None

    def is_ready(self, step: int, needed: int) -> bool:
        """Wait for the last checkpoint; return whether `needed` bytes are free for one of `step`.

        If not, the run continues with a warning, and the next checkpoint may find space.
        """
        self.wait()
        self.folder.mkdir(parents=True, exist_ok=True)
        free = disk.free_bytes(self.folder)
        if free < needed:
            log.warning(
                "no checkpoint at step %d: %s takes %s, but its disk has %s free: free some",
                step,
                self._path(step),
                disk.format_bytes(needed),
                disk.format_bytes(free),
            )
        return free >= needed

    def start_writing(self, step: int, state: State, is_before_decay: bool = False) -> None:
        """Write a checkpoint in the background, after `is_ready`."""
        self._written = self._writer.submit(self.write, step, state, is_before_decay)

    def wait(self) -> None:
        """Wait until the last checkpoint is published. Raises what its writing raised."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def raise_failure(self) -> None:
        """Raise what the writing of the last checkpoint raised, if it has ended."""
        if self._written is not None and self._written.done():
            self.wait()

    def write(self, step: int, state: State, is_before_decay: bool = False) -> None:
        """Write and publish a checkpoint, and remove those that are not kept."""
        final = self._path(step)
        working = self.folder / f".{final.name}.writing"
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        try:
            for name, content in state.items():
                if name.endswith(".safetensors"):
                    save_file(content, working / name)
                else:
                    files.write_json(working / name, content, sort_keys=True)
            records = {path.name: files.record_file(path) for path in sorted(working.iterdir())}
            manifest = CheckpointManifest(run=self.run, step=step, files=records)
            files.write_json(working / MANIFEST, manifest.model_dump())
            if is_before_decay:  # first: a run that resumes from `final` does not write it again
                copy = self.folder / f".{self.before_decay.name}.writing"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(working, copy)
                files.publish_folder(copy, self.before_decay)
            files.publish_folder(working, final)
        finally:
            shutil.rmtree(working, ignore_errors=True)
        for old in [*self._newest_first()[self.keep :], *self.folder.glob(f"{DAMAGED}*")]:
            shutil.rmtree(old)

    def describe_resume(self) -> str:
        """Tell the user of a run that ends now how to resume it."""
        for path in self._newest_first():
            if (path / MANIFEST).is_file():
                return f"re-run the command to resume from step {step_of(path)}"
        return "there is no checkpoint yet: re-running the command starts again"

    def _path(self, step: int) -> Path:
        return self.folder / f"{FOLDER_PREFIX}{step:06d}"

    def _newest_first(self) -> list[Path]:
        paths = self.folder.glob(f"{FOLDER_PREFIX}*")
        folders = [p for p in paths if p.is_dir() and p.name[len(FOLDER_PREFIX) :].isdecimal()]
        return sorted(folders, key=step_of, reverse=True)


def open_before_decay(output_dir: Path, run: Mapping[str, Any], every_byte: bool) -> Path:
    """Return the checkpoint from before the decay of the run that published `output_dir`.

    Without `every_byte`, files over 1 GiB are compared by size only. Raises ArtifactError if it is
    missing, damaged, or of another run.
    """
    path = before_decay_path(output_dir)
    manifest, problem = _read(path, every_byte)
    if not path.exists():
        problem = "not found: expected the output of a run with a constant phase (--decay-ratio)"
    elif problem is None and manifest is not None and manifest.run != run:
        problem = f"it is of a run {_describe_difference(manifest.run, run)}"
    if problem:
        raise ArtifactError(f"{output_dir} cannot be continued: {path}: {problem}")
    return path


def before_decay_path(output_dir: Path) -> Path:
    """Return the path of the checkpoint from before the decay of the run of `output_dir`."""
    return output_dir.with_name(output_dir.name + BEFORE_DECAY)


def step_of(path: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(path.name.removeprefix(FOLDER_PREFIX))


def _free_name(path: Path) -> Path:
    """Return the path, with a number appended if something is there already."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def _read(path: Path, every_byte: bool = True) -> tuple[CheckpointManifest | None, str | None]:
    """Return the manifest of a checkpoint, and what is wrong with the checkpoint, if anything."""
    try:
        manifest = CheckpointManifest.model_validate(files.read_json(path / MANIFEST))
        return manifest, files.find_problem(path, manifest.files, every_byte)
    except FileNotFoundError:
        return None, "it has no manifest"
    except ArtifactError as error:
        return None, str(error)
    except (OSError, ValueError):
        return None, "its manifest is damaged"


def _describe_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Name the first setting in which two runs differ."""
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            return f"with {name}={theirs.get(name)}, not {ours.get(name)}"
    return "like this one"


def copy_state(trainer: Any, wanted: bool, extra: Mapping[str, Any]) -> State:
    """Return a copy of a Trainer's state, by file; all processes call this, and one wants it.

    `extra` is added to the progress that `load_state` returns.
    """
    _link_moments(trainer)
    weights = gather_tensors(trainer, wanted)
    moments = gather_tensors(trainer, wanted, of_moments=True)
    random_states = _gather_random_states(trainer)
    if not wanted:
        return {}
    scaler = getattr(trainer.accelerator, "scaler", None)
    progress = {
        "optimizer_step": int(next(iter(_adam(trainer).state.values()))["step"]),
        "schedule": _plain_schedule(trainer),
        "scaler": scaler.state_dict() if scaler is not None else {},
        # The sum of the losses since the last log line, the same on all processes, and its step.
        "loss_sum": trainer._tr_loss.item(),
        "last_logged": trainer._globalstep_last_logged,
        **extra,
    }
    return {
        WEIGHTS: weights,
        OPTIMIZER: moments,
        RANDOM: random_states,
        TRAINER_STATE: asdict(trainer.state),
        PROGRESS: progress,
    }


def _plain_schedule(trainer: Any) -> dict[str, Any]:
    """Return the schedule's state, its rates as numbers; some optimizers have them as tensors."""
    state = dict(trainer.lr_scheduler.state_dict())
    for key in ("base_lrs", "_last_lr"):
        state[key] = [float(rate) for rate in state[key]]
    return state


def gather_tensors(trainer: Any, wanted: bool, of_moments: bool = False) -> dict[str, torch.Tensor]:
    """Return copies of the trained weights by parameter name, in full, in float32 on the CPU.

    All processes call this; those that do not want the weights get none. `of_moments` returns the
    moments instead, named parameter:moment; 8-bit ones as they are, codes and scales.
    """
    tensors = {}
    for name, parameter in _trained(trainer):
        for key in _moment_shapes(trainer, parameter) if of_moments else ("",):
            value = _gather(trainer, parameter, key)
            if wanted:
                tensors[f"{name}:{key}" if key else name] = value.to("cpu", copy=True).contiguous()
    return tensors


def set_weights(trainer: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Overwrite trained weights with float32 values, by parameter name; all processes call this."""
    parameters = dict(_trained(trainer))
    for name, value in weights:
        _scatter(trainer, parameters[name], "", value)


def load_state(trainer: Any, folder: Path) -> dict[str, Any]:
    """Load a saved state into a Trainer that is prepared for training; return its progress.

    Raises ArtifactError like `load_weights`.
    """
    progress = load_weights(trainer, folder)
    trainer.lr_scheduler.load_state_dict(progress["schedule"])
    rates = trainer.lr_scheduler.get_last_lr()
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # which torchao's optimizers keep
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    if progress["scaler"]:
        trainer.accelerator.scaler.load_state_dict(progress["scaler"])
    return progress


def load_weights(trainer: Any, folder: Path) -> dict[str, Any]:
    """Load weights and Adam's moments of a saved state; return its progress.

    Raises ArtifactError, before anything is loaded, if the checkpoint holds other tensors than the
    Trainer trains.
    """
    progress = dict(files.read_json(folder / PROGRESS))
    weights, moments = (load_file(folder / name) for name in (WEIGHTS, OPTIMIZER))
    shapes = {name: parameter.shape for name, parameter in _trained(trainer)}
    _check_tensors(folder / WEIGHTS, weights, shapes)
    optimizer.create_state(_adam(trainer), progress["optimizer_step"])
    _link_moments(trainer)
    of_moments = {
        f"{name}:{key}": shape
        for name, parameter in _trained(trainer)
        for key, shape in _moment_shapes(trainer, parameter).items()
    }
    _check_tensors(folder / OPTIMIZER, moments, of_moments)
    set_weights(trainer, weights.items())
    for name, parameter in _trained(trainer):
        for key in _moment_shapes(trainer, parameter):
            _scatter(trainer, parameter, key, moments[f"{name}:{key}"])
    return progress


def _check_tensors(
    path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]
) -> None:
    """Raise ArtifactError if a file's tensors differ from the expected names and shapes."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            problem = f"lacks {name}, which this run trains"
        elif name not in expected:
            problem = f"holds {name}, which this run does not train"
        elif found[name].shape != expected[name]:
            shapes = tuple(found[name].shape), tuple(expected[name])
            problem = f"holds {name} with shape {shapes[0]}, but this run trains {shapes[1]}"
        else:
            continue
        raise ArtifactError(
            f"{path} {problem}: resume with the versions that wrote it, or remove "
            f"{path.parent.parent} to start again"
        )


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


def _moment_shapes(trainer: Any, parameter: Any) -> dict[str, torch.Size]:
    """Return the names and shapes of a parameter's moments, in full."""
    if trainer.is_deepspeed_enabled:
        return dict.fromkeys(optimizer.MOMENTS, parameter.shape)
    moments = optimizer.moments(_adam(trainer), parameter)
    return {key: moment.shape for key, moment in moments.items()}


def _gather(trainer: Any, parameter: Any, key: str) -> torch.Tensor:
    """Return a trained weight (key "") or one of its moments, in full and in float32."""
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key:
            return safe_get_full_optimizer_state(parameter, key)
        return safe_get_full_fp32_param(parameter)
    if key:
        return optimizer.moments(_adam(trainer), parameter)[key]
    return parameter.detach().float()


def _scatter(trainer: Any, parameter: Any, key: str, value: torch.Tensor) -> None:
    """Set what `_gather` returns; every process keeps its shard."""
    value = value.to(parameter.device)
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # The float32 master; below, the model's own copy, which the next forward pass reads.
        safe_set_full_fp32_param(parameter, value)
    if key:
        optimizer.moments(_adam(trainer), parameter)[key].copy_(value)
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
