"""Continued pretraining's speed and memory, beside LLaMA-Factory 0.9.5: one model, the same blocks.

The model is a ChatGLM3 of 4 layers and width 256 with random weights, but with the real tokenizer:
steps 2 and 3 add all pieces of a Japanese BPE model, which gives it 78,592 embedding rows, and step
4 packs the demo's texts into blocks of 1024 tokens. Step 5 and `llamafactory-cli train` then start
from that folder and learn these blocks, --steps times 4 of them, with the same recipe: LoRA of rank
8 on all projections and both embeddings in full, one learning rate, AdamW, a cosine with the same
warm-up, float32 on the CPU, nothing scored and nothing saved in between.

Every run is a process of its own with all cores. The ways take turns, --rounds times; shown are
medians. Tokens per second are those of the Trainer's own `train_runtime`, so neither imports nor
loading and saving count; peak memory is that of the process from its start to its end, the saving
or merging included. In each step all ways learn from 4 blocks:

    LLaMA-Factory, 1 x 4    micro-batches of one block, gradients accumulated: its usual way
    LLaMA-Factory, 4 x 1    the four blocks in one pass
    step 5                  as it is: the four blocks in one pass, attention inside documents
    step 5, 1 x 4           the same in passes of one block: slower, in less memory
    step 5, no mask         attention across documents, as LLaMA-Factory has it in pretraining:
                            what the two compute is the same, and so are the losses

LLaMA-Factory needs an environment of its own; benchmarks/llamafactory_data.py says why:

    python3.11 -m venv lf
    lf/bin/pip install torch==2.13.0 llamafactory==0.9.5
    lf/bin/pip uninstall -y torchvision torchaudio
    touch lf/lib/python3.11/site-packages/torchaudio.py

    python benchmarks/training.py --base-model CHATGLM3_6B_DIR --ja-tokenizer ja_bpe.model \\
        --llamafactory lf/bin/python --work-dir SCRATCH

Of CHATGLM3_6B_DIR only config.json and tokenizer.model are read. What is prepared stays in
--work-dir (0.3 GB) and is taken from there the next time. Prints a table and a line of JSON.
"""

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

# A child's peak memory is at least that of this process, and LLaMA-Factory's interpreter runs this
# file too: torch, and what needs it, is imported where it is used.
from tqdm import tqdm  # noqa: E402

from chatglm_ja.cli import run  # noqa: E402
from chatglm_ja.errors import DataError  # noqa: E402

CORES = len(os.sched_getaffinity(0))
# The proportions are ChatGLM3-6B's as far as four layers of this width allow.
SMALL = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 856,
    "num_attention_heads": 8,
    "multi_query_group_num": 2,
    "kv_channels": 32,
}
BLOCK_SIZE = 1024
BLOCKS_PER_STEP = 4
LEARNING_RATE = 2e-4
WARMUP_RATIO = 0.03
LORA_RANK = 8
LORA_ALPHA = 16
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj"
BETA_2 = 0.95
SEED = 42

# Step 5 scores nothing and tracks nothing, as LLaMA-Factory.
STEP5_FLAGS = (
    f"--block-size={BLOCK_SIZE}",
    f"--global-batch-size={BLOCKS_PER_STEP}",
    "--evaluations=0",
    "--tracker=none",
)

LLAMAFACTORY = "LLaMA-Factory, {} x {}"
USUAL = LLAMAFACTORY.format(1, BLOCKS_PER_STEP)
ONE_PASS = LLAMAFACTORY.format(BLOCKS_PER_STEP, 1)
OURS = "step 5"
OURS_ACCUMULATED = f"step 5, 1 x {BLOCKS_PER_STEP}"
OURS_NO_MASK = "step 5, no mask"

FIELDS = ("tokens_per_second", "peak_gb")

Build = Callable[[Path], list[str]]  # the command line of a way, given its output folder


@dataclass(frozen=True)
class Prepared:
    """What all ways start from: the model, and its blocks in both forms."""

    model: Path
    data: Path
    blocks: Path


@dataclass(frozen=True)
class Run:
    """What one run of a way gave."""

    tokens_per_second: float
    peak_gb: float
    losses: list[float]


def main() -> None:
    arguments = parse_arguments()
    if arguments.task == "base":
        write_random_base(arguments.base_model, base_dir(arguments))
    elif arguments.task == "blocks":
        write_blocks(data_dir(arguments), blocks_dir(arguments))
    else:
        versions = {"step 5": our_versions(), "LLaMA-Factory": their_versions(arguments)}
        runs = measure(arguments, prepare(arguments))
        print_table(arguments, runs)
        print(json.dumps(summary(arguments, runs) | {"versions": versions}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-model", type=Path, required=True, help="ChatGLM3-6B's config.json, tokenizer.model"
    )
    parser.add_argument(
        "--ja-tokenizer", type=Path, required=True, help="output of step 1, or a BPE model file"
    )
    parser.add_argument(
        "--llamafactory", required=True, help="interpreter of an environment that has it"
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="folder that is kept")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way (default: 2)")
    parser.add_argument("--task", choices=("base", "blocks"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("steps", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}, expected 1 or more")
    for path in (arguments.base_model, arguments.ja_tokenizer):
        if not path.exists():
            parser.error(f"{path} not found")
    if shutil.which(arguments.llamafactory) is None:
        parser.error(f"--llamafactory {arguments.llamafactory} is no program")
    return arguments


def base_dir(arguments: argparse.Namespace) -> Path:
    return Path(arguments.work_dir, "base")


def data_dir(arguments: argparse.Namespace) -> Path:
    """As many blocks as the steps take, so that every way learns each of them once."""
    return Path(arguments.work_dir, f"step4_{arguments.steps * BLOCKS_PER_STEP}_blocks")


def blocks_dir(arguments: argparse.Namespace) -> Path:
    return Path(arguments.work_dir, f"llamafactory_{arguments.steps * BLOCKS_PER_STEP}_blocks")


# Programs


def environment(work_dir: Path) -> dict[str, str]:
    """The same for all: all cores, no GPU, no network, no caches of earlier runs elsewhere."""
    return os.environ | {
        "CHATGLM_JA_PROFILE": "demo",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(work_dir / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(CORES),
        "MKL_NUM_THREADS": str(CORES),
    }


def run_program(command: list[str], work_dir: Path, name: str) -> float:
    """Run a program to its end, what it says going to `name`.log; its peak resident memory in GB.

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


def our_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}


def their_versions(arguments: argparse.Namespace) -> dict[str, str]:
    packages = ("llamafactory", "torch", "transformers", "peft")
    code = f"import importlib.metadata as m; print(*map(m.version, {packages}))"
    done = subprocess.run(
        [arguments.llamafactory, "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.splitlines() or ["it fails"])[-1]
        raise DataError(
            f"{arguments.llamafactory} has no LLaMA-Factory ({reason}): see --help to install it"
        )
    return dict(zip(packages, done.stdout.split(), strict=True))


# Preparing


def prepare(arguments: argparse.Namespace) -> Prepared:
    """The model and the blocks; what an earlier run finished is left as it is."""
    work_dir: Path = arguments.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    base, tokenizer, model = base_dir(arguments), work_dir / "step2", work_dir / "step3"
    data, blocks = data_dir(arguments), blocks_dir(arguments)
    # This file again, for what needs libraries that this process must not load.
    again = [__file__, *sys.argv[1:], "--task"]
    tasks: dict[str, list[str]] = {}
    if not base.exists():
        tasks["base"] = [sys.executable, *again, "base"]
    tasks["step2"] = step("step2_merge_tokenizer", tokenizer, base_model=base)
    tasks["step2"] += [f"--ja-tokenizer={arguments.ja_tokenizer}", "--policy=all"]
    tasks["step3"] = step("step3_resize_model", model, base_model=base, tokenizer=tokenizer)
    tasks["step4"] = step("step4_prepare_data", data, tokenizer=tokenizer)
    tasks["step4"] += [
        f"--total-tokens={arguments.steps * BLOCKS_PER_STEP * BLOCK_SIZE}",
        f"--block-size={BLOCK_SIZE}",
        "--validation-tokens=0",
        # Conversations are not trained on here, but step 4 wants some.
        "--sft-examples=4",
        "--sft-validation-examples=0",
    ]
    if not blocks.exists():
        tasks["blocks"] = [arguments.llamafactory, *again, "blocks"]
    for name, command in tqdm(tasks.items(), desc="preparing"):
        run_program(command, work_dir, name)
    return Prepared(model, data, blocks)


def step(name: str, output: Path, **paths: Path) -> list[str]:
    """The command line of one of the seven steps."""
    inputs = [f"--{flag.replace('_', '-')}={path}" for flag, path in paths.items()]
    return [sys.executable, str(PROJECT / f"{name}.py"), f"--output-dir={output}", *inputs]


def write_random_base(source: Path, folder: Path) -> None:
    """A small ChatGLM3 of random weights, laid out as published, with `source`'s tokenizer.

    In float32: LLaMA-Factory trains in the stored dtype, and with float16 it fails on a CPU.
    """
    import torch
    from transformers import GlmForCausalLM

    from chatglm_ja import checkpoint, layout, tokenizer
    from chatglm_ja.base_config import read_config

    config = read_config(source) | SMALL | {"torch_dtype": "float32"}
    torch.manual_seed(SEED)
    model = GlmForCausalLM(layout.glm_config(config, config["padded_vocab_size"], torch.float32))
    unfinished = emptied(folder.with_suffix(".unfinished"))
    tensors = layout.to_chatglm(model.state_dict())
    checkpoint.write_sharded(
        ((name, tensor.contiguous()) for name, tensor in tensors.items()), unfinished, 10**9
    )
    text = json.dumps(config, indent=1)
    (unfinished / "config.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(source / tokenizer.MODEL_FILE, unfinished / tokenizer.MODEL_FILE)
    unfinished.rename(folder)


def write_blocks(data: Path, folder: Path) -> None:
    """Step 4's blocks as LLaMA-Factory's own preprocessing saves them, for its `tokenized_path`;
    run by its interpreter."""
    import datasets

    shards = sorted(data.glob("pretrain_train-*.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(s)) for s in shards])
    blocks = rows.to_dict()["input_ids"]
    masks = [[1] * len(block) for block in blocks]
    # The labels are its collator's.
    saved = datasets.Dataset.from_dict({"input_ids": blocks, "attention_mask": masks})
    unfinished = emptied(folder.with_suffix(".unfinished"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(unfinished))
    unfinished.rename(folder)


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# Measuring


def step5_command(
    arguments: argparse.Namespace, prepared: Prepared, output: Path, micro_batch: int, *flags: str
) -> list[str]:
    command = step("step5_train_pt", output, model=prepared.model, data=prepared.data)
    command += [
        f"--max-steps={arguments.steps}",
        f"--learning-rate={LEARNING_RATE}",
        f"--embedding-learning-rate={LEARNING_RATE}",
        f"--warmup-ratio={WARMUP_RATIO}",
        f"--lora-rank={LORA_RANK}",
        f"--lora-alpha={LORA_ALPHA}",
        "--precision=fp32",
        "--logging-steps=1",
        f"--save-steps={arguments.steps}",  # after the last step it saves no checkpoint
        f"--seed={SEED}",
        f"--micro-batch-size={micro_batch}",
    ]
    return [*command, *STEP5_FLAGS, *flags]


def llamafactory_command(
    arguments: argparse.Namespace, prepared: Prepared, output: Path, micro_batch: int
) -> list[str]:
    """Its command line; the recipe goes into a file beside `output`."""
    recipe = {
        "stage": "pt",
        "do_train": True,
        "model_name_or_path": str(prepared.model),
        "template": "empty",
        "dataset": "blocks",  # it wants a name, and loads tokenized_path
        "tokenized_path": str(prepared.blocks),
        "cutoff_len": BLOCK_SIZE,
        "finetuning_type": "lora",
        "lora_rank": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "lora_target": LORA_TARGETS,
        "additional_target": "embed_tokens,lm_head",
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": BLOCKS_PER_STEP // micro_batch,
        "max_steps": arguments.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(arguments.steps * WARMUP_RATIO),
        "adam_beta2": BETA_2,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "disable_gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "output_dir": str(output),
    }
    path = output.with_suffix(".yaml")  # it cannot read .json; JSON is YAML
    path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return [arguments.llamafactory, "-m", "llamafactory.cli", "train", str(path)]


def measure(arguments: argparse.Namespace, prepared: Prepared) -> dict[str, list[Run]]:
    """All ways in turn, as many times as asked."""
    builds: dict[str, Build] = {
        USUAL: lambda output: llamafactory_command(arguments, prepared, output, 1),
        ONE_PASS: lambda output: llamafactory_command(arguments, prepared, output, BLOCKS_PER_STEP),
        OURS: lambda output: step5_command(arguments, prepared, output, BLOCKS_PER_STEP),
        OURS_ACCUMULATED: lambda output: step5_command(arguments, prepared, output, 1),
        OURS_NO_MASK: lambda output: step5_command(
            arguments, prepared, output, BLOCKS_PER_STEP, "--no-document-mask"
        ),
    }
    runs: dict[str, list[Run]] = {way: [] for way in builds}
    with tqdm(total=arguments.rounds * len(builds), desc="training", unit=" runs") as bar:
        for _ in range(arguments.rounds):
            for way, build in builds.items():
                bar.set_postfix_str(way)
                runs[way].append(run_way(arguments, way, build))
                bar.update()
    return runs


def run_way(arguments: argparse.Namespace, way: str, build: Build) -> Run:
    output = arguments.work_dir / "output"
    shutil.rmtree(output, ignore_errors=True)
    name = "".join(c if c.isalnum() else "_" for c in way)
    peak = run_program(build(output), arguments.work_dir, name)
    losses, seconds = read_history(output)
    shutil.rmtree(output)
    if len(losses) != arguments.steps:
        raise DataError(f"{way} logged {len(losses)} losses, expected {arguments.steps}")
    return Run(arguments.steps * BLOCKS_PER_STEP * BLOCK_SIZE / seconds, peak, losses)


def read_history(output: Path) -> tuple[list[float], float]:
    """The loss of every step, and the seconds that Trainer.train() took, of either program.

    LLaMA-Factory's Trainer divides a block's loss by its 1024 tokens, of which nothing predicts the
    first: here its losses too are means over the 1023 others.
    """
    ours, theirs = output / "history.json", output / "trainer_state.json"
    scale = 1.0
    if ours.exists():
        history = json.loads(ours.read_text(encoding="utf-8"))
    else:
        history = json.loads(theirs.read_text(encoding="utf-8"))["log_history"]
        scale = BLOCK_SIZE / (BLOCK_SIZE - 1)
    losses = [scale * entry["loss"] for entry in history if "loss" in entry]
    return losses, next(e["train_runtime"] for e in history if "train_runtime" in e)


# Showing


def median(runs: list[Run], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


def ratios(runs: dict[str, list[Run]], field: str, against: str) -> dict[str, float]:
    """The median of every way, divided by that of one of them."""
    return {way: median(runs[way], field) / median(runs[against], field) for way in runs}


def print_table(arguments: argparse.Namespace, runs: dict[str, list[Run]]) -> None:
    speed, memory = (ratios(runs, field, USUAL) for field in FIELDS)
    print(f"{arguments.steps} steps, {CORES} cores, medians of {arguments.rounds} runs;")
    print(f"in brackets: to {USUAL}\n")
    print("| way | tokens/s | peak memory, GB | first loss | last loss |")
    print("|---|---:|---:|---:|---:|")
    for way, of_way in runs.items():
        print(
            f"| {way} | {median(of_way, 'tokens_per_second'):,.0f} ({speed[way]:.2f}) "
            f"| {median(of_way, 'peak_gb'):.2f} ({memory[way]:.2f}) "
            f"| {of_way[0].losses[0]:.4f} | {of_way[0].losses[-1]:.4f} |"
        )


def summary(arguments: argparse.Namespace, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """What the table shows and all single runs; the ratios are step 5's to LLaMA-Factory's."""
    return {
        "steps": arguments.steps,
        "blocks_per_step": BLOCKS_PER_STEP,
        "block_size": BLOCK_SIZE,
        "cores": CORES,
        "medians": {
            way: {field: round(median(of_way, field), 3) for field in FIELDS}
            for way, of_way in runs.items()
        },
        "ratios": {
            against: {
                way: {field: round(ratios(runs, field, against)[way], 3) for field in FIELDS}
                for way in (OURS, OURS_ACCUMULATED, OURS_NO_MASK)
            }
            for against in (USUAL, ONE_PASS)
        },
        "runs": {way: [asdict(run) for run in of_way] for way, of_way in runs.items()},
    }


if __name__ == "__main__":
    run(main)
