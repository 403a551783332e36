"""Shared code of the comparisons with LLaMA-Factory 0.9.5, training.py and sft.py.

A way to train is either a step of this project or `llamafactory-cli train`. Each receives the same
Recipe as its own flags or settings: LoRA on all projections, AdamW, a cosine schedule with the same
warm-up, float32 on the CPU, no evaluation and no checkpoint during training, and no gradient
checkpointing.

Every run is a separate process with all cores, and the ways take turns. Tokens/s use the Trainer's
own `train_runtime`, which excludes imports, loading and saving. Peak memory is the process's
maximum from start to end, including saving or merging.

A child's peak memory is at least that of its parent, and LLaMA-Factory's interpreter imports this
file too. Therefore neither this module nor the measuring process may import torch or anything that
needs it.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
from measuring import Ratio, step_command
from tqdm import tqdm

from chatglm_ja.errors import DataError

CORES = len(os.sched_getaffinity(0))
WARMUP_RATIO = 0.03
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj"
BETA_2 = 0.95
SEED = 42

FIELDS = ("tokens_per_second", "peak_gb")


@dataclass(frozen=True)
class Recipe:
    """The training settings given to every way."""

    steps: int
    rows: int  # per step
    micro_batch: int  # rows per micro-batch
    block_size: int  # tokens in the longest row
    learning_rate: float
    lora_rank: int
    lora_alpha: int

    def flags(self) -> list[str]:
        """Return the flags for steps 5 and 6."""
        return [
            f"--max-steps={self.steps}",
            f"--global-batch-size={self.rows}",
            f"--micro-batch-size={self.micro_batch}",
            f"--block-size={self.block_size}",
            f"--learning-rate={self.learning_rate}",
            f"--warmup-ratio={WARMUP_RATIO}",
            "--decay-ratio=1",  # a cosine from the warm-up on
            f"--lora-rank={self.lora_rank}",
            f"--lora-alpha={self.lora_alpha}",
            "--precision=fp32",
            "--logging-steps=1",
            f"--save-steps={self.steps}",  # no checkpoint is saved after the last step
            "--evaluations=0",
            "--tracker=none",
            f"--seed={SEED}",
        ]

    def settings(self) -> dict[str, Any]:
        """Return the settings for LLaMA-Factory."""
        return {
            "do_train": True,
            "template": "empty",
            "dataset": "rows",  # a name is required; the data comes from tokenized_path
            "cutoff_len": self.block_size,
            "finetuning_type": "lora",
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": 0.0,
            "lora_target": LORA_TARGETS,
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.rows // self.micro_batch,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": math.ceil(self.steps * WARMUP_RATIO),
            "adam_beta2": BETA_2,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "disable_gradient_checkpointing": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": SEED,
        }


@dataclass(frozen=True)
class Way:
    """One way to train."""

    command: Callable[[Path], list[str]]  # output folder -> command line
    steps: int
    tokens: int  # trained on in one run


@dataclass(frozen=True)
class Run:
    """The measurements of one run of a way."""

    tokens_per_second: float
    peak_gb: float
    losses: list[float]


# Command lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--llamafactory", required=True, help="Python interpreter of its environment"
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="folder for inputs and logs; kept"
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way (default: 2)")


def check_arguments(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, paths: Sequence[Path]
) -> None:
    """Exit with an error if an argument is wrong or one of `paths` does not exist."""
    for name in ("steps", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, expected 1 or more")
    for path in paths:
        if not path.exists():
            parser.error(f"{path} not found")
    if shutil.which(arguments.llamafactory) is None:
        parser.error(f"--llamafactory {arguments.llamafactory} is no program")


def step_way(name: str, recipe: Recipe, tokens: int, *flags: str, **paths: Path) -> Way:
    """Return step 5 or 6 as a way, with additional `flags`."""

    def command(output: Path) -> list[str]:
        return [*step_command(name, output, **paths), *recipe.flags(), *flags]

    return Way(command, recipe.steps, tokens)


def llamafactory_way(interpreter: str, recipe: Recipe, tokens: int, **settings: str) -> Way:
    """Return LLaMA-Factory as a way, with additional `settings`.

    Its recipe is written to a file beside the output folder.
    """

    def command(output: Path) -> list[str]:
        text = json.dumps(settings | recipe.settings() | {"output_dir": str(output)}, indent=1)
        path = output.with_suffix(".yaml")  # it cannot read .json; JSON is YAML
        path.write_text(text + "\n", encoding="utf-8")
        return [interpreter, "-m", "llamafactory.cli", "train", str(path)]

    return Way(command, recipe.steps, tokens)


# Programs


def environment(work_dir: Path) -> dict[str, str]:
    """Return the environment of every run: all cores, no GPU, no network, its own cache."""
    return os.environ | {
        "CHATGLM_JA_PROFILE": "demo",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(work_dir / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(CORES),
        "MKL_NUM_THREADS": str(CORES),
    }


def run_program(command: list[str], work_dir: Path, name: str) -> float:
    """Run a program with its output in `name`.log; return its peak resident memory in GB.

    Raises DataError with the end of the log if it fails.
    """
    log = work_dir / f"{name}.log"
    with open(log, "w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command, env=environment(work_dir), stdout=file, stderr=subprocess.STDOUT
        )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise DataError(
            f"{name} ended with status {child.returncode}; {log} ends:\n" + "\n".join(tail)
        )
    return usage.ru_maxrss * 1024 / 1e9


def versions(interpreter: str) -> dict[str, dict[str, str]]:
    """Return the versions of LLaMA-Factory's packages; raise DataError if it is not installed."""
    theirs = ("llamafactory", "torch", "transformers", "peft")
    code = f"import importlib.metadata as m; print(*map(m.version, {theirs}))"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["it fails"])[-1]
        raise DataError(
            f"{interpreter} has no LLaMA-Factory ({reason}): benchmarks/llamafactory_data.py says "
            "how to install it"
        )
    return {"LLaMA-Factory": dict(zip(theirs, done.stdout.split(), strict=True))}


# Measuring


def take_turns(ways: Mapping[str, Way], rounds: int, work_dir: Path) -> dict[str, list[Run]]:
    """Run all ways in turn, `rounds` times; return the runs of each."""
    runs: dict[str, list[Run]] = {title: [] for title in ways}
    with tqdm(total=rounds * len(ways), desc="training", unit=" runs") as bar:
        for _ in range(rounds):
            for title, way in ways.items():
                bar.set_postfix_str(title)
                runs[title].append(run_way(title, way, work_dir))
                bar.update()
    return runs


def run_way(title: str, way: Way, work_dir: Path) -> Run:
    output = work_dir / "output"
    shutil.rmtree(output, ignore_errors=True)
    name = "".join(c if c.isalnum() else "_" for c in title)
    peak = run_program(way.command(output), work_dir, name)
    losses, seconds = read_history(output)
    shutil.rmtree(output)
    if len(losses) != way.steps:
        raise DataError(f"{title} logged {len(losses)} losses, expected {way.steps}")
    return Run(way.tokens / seconds, peak, losses)


def read_history(output: Path) -> tuple[list[float], float]:
    """Return every step's logged loss and the seconds of Trainer.train(), for either program."""

    def read(name: str) -> Any:
        return json.loads((output / name).read_text(encoding="utf-8"))

    if (output / "history.json").exists():
        history = read("history.json")
        seconds = read("manifest.json")["counts"]["speed"]["seconds"]
    else:
        history = read("trainer_state.json")["log_history"]
        seconds = next(e["train_runtime"] for e in history if "train_runtime" in e)
    return [entry["loss"] for entry in history if "loss" in entry], seconds


# Showing


def median(runs: Sequence[Run], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


def ratios(runs: Mapping[str, list[Run]], field: str, against: str) -> dict[str, float]:
    """Return the median of every way divided by the median of `against`."""
    return {way: median(runs[way], field) / median(runs[against], field) for way in runs}


def compared(
    runs: Mapping[str, list[Run]], way: str, against: str, speed_aim: str = "", memory_aim: str = ""
) -> list[Ratio]:
    """Return the ratios of one way's speed and memory to another's."""
    aims = dict(zip(FIELDS, (speed_aim, memory_aim), strict=True))
    names = dict(zip(FIELDS, ("tokens/s", "peak memory"), strict=True))
    return [
        Ratio(f"{way}, {names[field]}, to {against}", ratios(runs, field, against)[way], aim)
        for field, aim in aims.items()
    ]


def recorded(runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    """Return all individual runs, for the line of JSON."""
    return {"cores": CORES, "runs": {way: [asdict(run) for run in of] for way, of in runs.items()}}
