"""Measure speed and memory of steps 5 and 6 at ChatGLM3-6B's size on one GPU, without its weights.

A model of ChatGLM3-6B's shape (28 layers of width 4096, 78,592 embedding rows) gets random weights,
and blocks of 1024 random tokens are written in step 4's format. For each scenario, training.train,
which step 5 calls, runs on them in its own process:

    4090 x 4     one rank's share of four under ZeRO-2, with gradient checkpointing, limited to 24
                 GiB of memory
    share of 4   the same without gradient checkpointing, with all of the GPU's memory
    one GPU      a single process without DeepSpeed
    SFT          conversations from --conversations, a folder of step 4 with bins of 1024 tokens:
                 LoRA only, a single process; packed, or padded with as many conversations per step
    ...          variants with --compile and other settings

For a share, the process is rank 0 of four in a process group that sends nothing ("fake", torch's
own for tests). DeepSpeed then holds and updates exactly what it would on one of four GPUs: a
quarter of the float32 weights, Adam's moments and gradients. The measurement covers all memory
except NCCL's own buffers, and all computation. It does not cover the time to send gradients and
weights, and the speed is that of the GPU it runs on.

    python benchmarks/train_6b.py --work-dir /dev/shm/6b            # 13 GB, made once
    python benchmarks/train_6b.py --work-dir DIR --scenarios "4090 x 4" "one GPU"

    python step4_prepare_data.py --max-length 1024 --output-dir DATA     # with the demo's profile
    python benchmarks/train_6b.py --work-dir DIR --conversations DATA --scenarios "SFT, packed" ...

New rows and conversations need --tokenizer, the output folder of step 2. Prints a table: the
estimate of --estimate, the measured peak, tokens/s (for conversations, without padding) and MFU
(medians over the last steps), and HFU, which counts recomputation too. `--layers 2 --hidden 256`
tests the script itself on a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
import measuring
from measuring import PROJECT, Ratio, emptied
from tqdm import tqdm

BLOCK_SIZE = 1024
LOGGING_STEPS = 4
WARM_UP = 1  # log lines excluded from the speed
GIB = 2**30

# Settings of TrainingConfig, and three of this script's own: `ranks`, `gib` (memory limit) and
# `name` (data set).
SHARE: dict[str, Any] = {"ranks": 4, "micro_batch_size": 4, "deepspeed": PROJECT / "ds_zero2.json"}
ONE: dict[str, Any] = {"ranks": 1, "micro_batch_size": 4}
RTX_4090: dict[str, Any] = {**SHARE, "gib": 24, "gradient_checkpointing": "full"}
COMPILED: dict[str, Any] = {"compile": True}
SFT: dict[str, Any] = {**ONE, "name": "sft", "train_embeddings": False}
PADDED: dict[str, Any] = {"packing": False}
SCENARIOS: dict[str, dict[str, Any]] = {
    "4090 x 4": RTX_4090,
    "4090 x 4, compiled": RTX_4090 | COMPILED,
    "4090 x 4, compiled, selective": RTX_4090 | COMPILED | {"gradient_checkpointing": "selective"},
    "4090 x 4, compiled, 8 blocks": RTX_4090 | COMPILED | {"micro_batch_size": 8},
    "4090 x 4, compiled, rank 64": RTX_4090 | COMPILED | {"lora_rank": 64, "lora_alpha": 128},
    "4090 x 4, compiled, new rows": RTX_4090 | COMPILED | {"embedding_rows": "new"},
    "share of 4": SHARE,
    "share of 4, compiled": SHARE | COMPILED,
    "share of 4, compiled, 8 blocks": SHARE | COMPILED | {"micro_batch_size": 8},
    "one GPU": ONE,
    "one GPU, compiled": ONE | COMPILED,
    "one GPU, compiled, 8 blocks": ONE | COMPILED | {"micro_batch_size": 8},
    "SFT, packed": SFT,
    "SFT, packed, compiled": SFT | COMPILED,
    "SFT, packed, with embeddings": SFT | {"train_embeddings": True},
    "SFT, padded, 8 a pass": SFT | PADDED | {"micro_batch_size": 8},
    "SFT, padded, 24 a pass": SFT | PADDED | {"micro_batch_size": 24},
    "SFT, padded, 72 a pass": SFT | PADDED | {"micro_batch_size": 72},
}
PADDED_AS_USUAL = "SFT, padded, 24 a pass"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="folder for model and data, 13 GB; kept"
    )
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, help="(default: all)")
    parser.add_argument("--steps", type=int, default=20, help="(default: 20)")
    parser.add_argument("--layers", type=int, default=28, help="(default: 28)")
    parser.add_argument("--hidden", type=int, default=4096, help="width (default: 4096)")
    parser.add_argument("--rows", type=int, default=78_592, help="(default: 78592)")
    parser.add_argument("--tokenizer", type=Path, help="output folder of step 2")
    parser.add_argument(
        "--conversations", type=Path, help="output folder of step 4 with bins of 1024 tokens"
    )
    parser.add_argument("--measure", choices=SCENARIOS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2 * LOGGING_STEPS:
        parser.error(f"--steps is {options.steps}, expected {2 * LOGGING_STEPS} or more")
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    chosen = options.scenarios or list(SCENARIOS)
    if options.conversations is None:
        wanting = [name for name in chosen if "name" in SCENARIOS[name]]
        if options.scenarios and wanting:
            parser.error(f"{wanting[0]} needs --conversations")
        chosen = [name for name in chosen if name not in wanting]
    options.scenarios = chosen
    make_model(options)
    make_data(options)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    found: dict[str, dict[str, Any] | str] = {}
    with tqdm(options.scenarios, unit=" scenarios") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            found[name] = in_a_process(name, options.work_dir)
    print(f"On {device}, torch {torch.__version__}; tokens/s of one process\n")
    head = ["", "estimate", "peak memory", "tokens/s", "MFU", "HFU", "start"]
    print(measuring.table(head, [row(name, result) for name, result in found.items()]))
    measured = {name: result for name, result in found.items() if not isinstance(result, str)}
    measuring.conclude(compared(measured))


def compared(found: Mapping[str, dict[str, Any]]) -> list[Ratio]:
    """Return the speed ratios of compiled to not compiled, and of packed to padded."""
    pairs = [(f"{name}, compiled", name) for name in found]
    pairs += [(name, PADDED_AS_USUAL) for name in found if name.startswith("SFT, packed")]
    return [
        Ratio(
            f"{way}, tokens/s, to {against}",
            found[way]["tokens_per_second"] / found[against]["tokens_per_second"],
        )
        for way, against in pairs
        if way in found and against in found
    ]


def row(name: str, found: dict[str, Any] | str) -> list[str]:
    """Return a row of the table; if the scenario failed, with the reason."""
    if isinstance(found, str):
        return [name, "", "", "", "", "", f"failed: {found}"]
    return [
        name,
        f"{found['estimate_gb']:.2f} GB",
        f"{found['memory_gb']:.2f} GB",
        f"{found['tokens_per_second']:,.0f}",
        *("" if found[name] is None else f"{found[name]:.1%}" for name in ("mfu", "hfu")),
        f"{found['start_seconds']:.0f} s",
    ]


def in_a_process(name: str, folder: Path) -> dict[str, Any] | str:
    """Measure a scenario in a fresh process and keep its log.

    Returns the figures, or why it failed.
    """
    command = [sys.executable, *sys.argv, "--measure", name]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / f"{name}.log").write_text(ended.stderr, encoding="utf-8")
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or ["no word"])[-1][:200]
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process as rank 0 of `ranks`; return the figures, with tokens/s of one GPU."""
    settings = dict(SCENARIOS[name])
    ranks, gib = settings.pop("ranks"), settings.pop("gib", None)
    data_set = settings.pop("name", "pretrain")
    import torch

    if ranks > 1:
        join_group_of(ranks)
    if gib is not None and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / whole)
    from chatglm_ja.bases.shape import read_shape
    from chatglm_ja.data import dataset
    from chatglm_ja.training import costs, train
    from chatglm_ja.training.settings import TrainingConfig

    data, blocks = options.work_dir / "data", settings["micro_batch_size"] * ranks
    if data_set == "sft":
        data = options.conversations
        if not settings.get("packing", True):
            # As many conversations as a packed step has, in whole micro-batches.
            bins = dataset.load_rows(data, data_set, "train")
            wanted = ONE["micro_batch_size"] * len(dataset.unpack_rows(bins)) / len(bins)
            blocks *= max(1, round(wanted / blocks))
    config = TrainingConfig(
        model=options.work_dir / "model",
        data=data,
        output_dir=options.work_dir / "output",
        block_size=BLOCK_SIZE,
        global_batch_size=blocks,
        max_steps=options.steps,
        logging_steps=LOGGING_STEPS,
        evaluations=0,
        tracker="none",
        **settings,
    )
    shape = read_shape(config.model)
    items = costs.estimate_memory(shape, config.count_parameters(shape), config, ranks)
    started = time.monotonic()
    result = train.train(config, data_set, None)
    history = result["history"]
    lines = [entry for entry in history if "tokens_per_second" in entry]
    steady = lines[WARM_UP:]
    tokens = LOGGING_STEPS * result["tokens_per_step"]
    mfu = statistics.median(e["mfu"] for e in steady) if "mfu" in steady[0] else None
    repeated = costs.recomputed_share(shape, config, BLOCK_SIZE / 2)
    seconds = [tokens / line["tokens_per_second"] for line in lines]
    return {
        "estimate_gb": sum(size for _, size in items),
        "memory_gb": lines[-1]["memory_gb"],
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in steady) / ranks,
        "mfu": mfu,
        "hfu": None if mfu is None else mfu * (1 + repeated),
        "start_seconds": time.monotonic() - started - sum(seconds[WARM_UP:]),
    }


def join_group_of(ranks: int) -> None:
    """Make this process rank 0 of a process group that sends nothing."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


def make_model(options: argparse.Namespace) -> None:
    """Write random weights in step 3's layout unless they exist."""
    folder = options.work_dir / "model"
    if folder.is_dir():
        return
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    from chatglm_ja.bases import families
    from chatglm_ja.chatglm3 import base_config
    from chatglm_ja.storage import weights

    config: GlmConfig = base_config.glm_config(
        {
            "num_layers": options.layers,
            "hidden_size": options.hidden,
            "ffn_hidden_size": options.hidden * 13_696 // 4096,
            "num_attention_heads": options.hidden // 128,
            "multi_query_group_num": 2,
            "kv_channels": 128,
            "layernorm_epsilon": 1e-5,
            "seq_length": 8192,
            "padded_vocab_size": options.rows,
        },
        options.rows,
        torch.float16,
    )
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in GlmForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            if "norm" in name:
                yield name, torch.ones(shape, dtype=torch.float16)
            else:
                weight = torch.randn(shape, dtype=torch.float16, device=device) * 0.02
                yield name, weight.cpu()

    unfinished = emptied(folder.with_suffix(".unfinished"))
    weights.write_sharded(tensors(), unfinished, 2 * 10**9)
    if options.tokenizer:
        families.copy_tokenizer(options.tokenizer, unfinished)
    config.save_pretrained(unfinished)
    unfinished.rename(folder)


def make_data(options: argparse.Namespace) -> None:
    """Write blocks of two to four documents of random ids in step 4's format unless they exist."""
    folder = options.work_dir / "data"
    if folder.is_dir():
        return
    import datasets
    import numpy as np
    from datasets.arrow_writer import ArrowWriter

    unfinished = emptied(folder.with_suffix(".unfinished"))
    numbers = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"input_ids": numbers, "lengths": numbers, "sources": numbers})
    generator = np.random.default_rng(0)
    for split, count in (("train", 1024), ("validation", 0)):
        path = unfinished / f"pretrain_{split}-00000-of-00001.arrow"
        with ArrowWriter(path=str(path), features=features) as writer:
            for _ in range(count):
                cuts = np.sort(generator.choice(BLOCK_SIZE - 1, generator.integers(1, 4), False))
                lengths = np.diff([0, *(cuts + 1), BLOCK_SIZE]).tolist()
                ids = generator.integers(3, options.rows, BLOCK_SIZE).tolist()
                writer.write({"input_ids": ids, "lengths": lengths, "sources": [0] * len(lengths)})
            writer.finalize()
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
