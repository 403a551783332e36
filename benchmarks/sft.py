"""Compare fine-tuning speed on the same conversations: packed, padded, and LLaMA-Factory 0.9.5.

The measure is trained tokens (those of the answers) per second. It is taken for step 6 with the
bins that step 4 packed, for step 6 with --no-packing, and for LLaMA-Factory in `stage: sft` with
its default of no packing. All start from the demo's model after step 5 and use the same token ids
and labels: LLaMA-Factory loads step 4's conversations, one per row, as its own preprocessing would
have saved them. It loads the model in float32, because it trains in the stored dtype and fails on a
CPU with float16. The recipe is the same: LoRA of rank 16 on all projections, embeddings frozen,
AdamW, a cosine schedule with the same warm-up, float32 on the CPU, no evaluation and no checkpoint
during training.

A run is one epoch without its incomplete last step. A step takes 8 bins, of 256 tokens in the demo,
or N conversations: as many as 8 bins hold on average, rounded up to a multiple of 8 (40 in the
demo). `8 x 5` is 5 micro-batches of 8 rows with gradient accumulation:

    step 6, packed             the 8 bins as one micro-batch, attention inside conversations
    step 6, padded, 8 x N/8    conversations padded to the longest of a micro-batch
    step 6, padded, N x 1      the same as one micro-batch
    LLaMA-Factory, 1 x N       padding only to a multiple of 8 tokens, which it always adds
    LLaMA-Factory, 8 x N/8     as step 6, padded
    LLaMA-Factory, N x 1       the same as one micro-batch

All but the first learn from the same conversations in the same order, and their losses agree.

Every run is a separate process with all cores. The ways take turns, --rounds times; the output
shows medians. Tokens/s use the Trainer's own `train_runtime`, which excludes imports, loading and
saving. Peak memory is the process's maximum from start to end, including saving or merging. The
tokens of a run are computed as its rows times the mean of all rows, which is an estimate if --steps
is less than an epoch. Padding is the share of computed positions without a token, with the rows in
a random order that differs from the runs' order.

Padding is not the only difference between step 6 and LLaMA-Factory: LLaMA-Factory computes the
logits of all positions, step 6 only those of trained tokens. LLaMA-Factory's own packing and
batches of rows of similar length are not measured, because neither program uses them by default.

LLaMA-Factory needs its own environment; benchmarks/llamafactory_data.py says how to install it.
Steps 1 to 5 of the demo must have run.

    python benchmarks/sft.py --llamafactory lf/bin/python --work-dir SCRATCH

Prints a table and a line of JSON. --work-dir keeps the logs and LLaMA-Factory's inputs.
"""

import argparse
import json
import math
import multiprocessing
import random
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

# In this folder; importing them makes the project's package importable.
import measuring
import peer
from measuring import Ratio
from peer import Recipe, Run, Way

from chatglm_ja.cli import run
from chatglm_ja.errors import DataError

DEMO = measuring.PROJECT / "artifacts" / "demo"
BINS_PER_STEP = 8
MICRO_BATCH = 8
LEARNING_RATE = 2e-3
LORA_RANK = 16
LORA_ALPHA = 32
LLAMAFACTORY_MULTIPLE = 8  # its collator pads to a multiple of this many tokens

PACKED = "step 6, packed"
PADDED = "step 6, padded, {} x {}"
LLAMAFACTORY = "LLaMA-Factory, {} x {}"


@dataclass(frozen=True)
class Rows:
    """The token counts of step 4's training rows, as packed bins and as single conversations."""

    bins: list[int]
    conversations: list[int]
    block_size: int
    trained_share: float  # share of tokens that are trained

    @property
    def conversations_per_step(self) -> int:
        """As many as BINS_PER_STEP bins hold, rounded up to a multiple of MICRO_BATCH."""
        mean = BINS_PER_STEP * len(self.conversations) / len(self.bins)
        return MICRO_BATCH * math.ceil(mean / MICRO_BATCH)


@dataclass(frozen=True)
class WayWithPadding:
    """One way to train, and the share of padding among its computed positions."""

    way: Way
    padding: float


def main() -> None:
    arguments = parse_arguments()
    versions = peer.versions(arguments.llamafactory)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    # Another process loads the libraries that this one must not load (see peer.py).
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        rows = apart.submit(prepare, arguments).result()
    ways = ways_to_train(arguments, rows)
    runs = peer.take_turns(
        {title: padded.way for title, padded in ways.items()}, arguments.rounds, arguments.work_dir
    )
    print_table(arguments, rows, ways, runs)
    measuring.conclude(compared(runs), versions, **peer.recorded(runs))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=DEMO / "step5_pt",
        help="output folder of step 5 (default: the demo's)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DEMO / "step4_data",
        help="output folder of step 4 (default: the demo's)",
    )
    peer.add_arguments(parser)
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each way (default: one epoch)"
    )
    arguments = parser.parse_args()
    peer.check_arguments(parser, arguments, [arguments.model, arguments.data])
    return arguments


# Preparing


def prepare(arguments: argparse.Namespace) -> Rows:
    """Write LLaMA-Factory's inputs from scratch; run this in a separate process."""
    import datasets

    from chatglm_ja.data import dataset
    from chatglm_ja.storage.inputs import open_artifact

    open_artifact(arguments.model, "step5_train_pt.py")
    data = open_artifact(arguments.data, "step4_prepare_data.py")

    model = model_dir(arguments)
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(arguments.model, model, ignore=shutil.ignore_patterns("adapter"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(
        config | {"dtype": "float32"}, indent=1
    )  # the dtype in which it loads the weights
    (model / "config.json").write_text(text + "\n", encoding="utf-8")

    bins = dataset.load_rows(arguments.data, "sft", "train")
    columns = dataset.unpack_rows(bins).select_columns(["input_ids", "labels"]).to_dict()
    columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
    datasets.disable_progress_bars()
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})
    saved.save_to_disk(str(measuring.emptied(conversations_dir(arguments))))
    return Rows(
        bins=[sum(lengths) for lengths in bins["lengths"]],
        conversations=[len(ids) for ids in columns["input_ids"]],
        block_size=data.read_number("arguments", "max_length"),
        trained_share=dataset.scored_share(bins, len(bins)),
    )


def model_dir(arguments: argparse.Namespace) -> Path:
    return Path(arguments.work_dir, "model_float32")


def conversations_dir(arguments: argparse.Namespace) -> Path:
    return Path(arguments.work_dir, "conversations")


# Measuring


def ways_to_train(arguments: argparse.Namespace, rows: Rows) -> dict[str, WayWithPadding]:
    number = rows.conversations_per_step
    passes = number // MICRO_BATCH
    packed = recipe_for(arguments, rows, rows.bins, BINS_PER_STEP)
    one_pass = recipe_for(arguments, rows, rows.conversations, number)
    accumulated = replace(one_pass, micro_batch=MICRO_BATCH)
    one_by_one = replace(one_pass, micro_batch=1)

    def ours(recipe: Recipe, lengths: Sequence[int], *flags: str) -> WayWithPadding:
        way = peer.step_way(
            "step6_train_sft",
            recipe,
            tokens_learned(recipe, lengths),
            "--no-train-embeddings",
            "--samples=0",
            "--replay=0",
            *flags,
            model=arguments.model,
            data=arguments.data,
        )
        return WayWithPadding(way, padding_share(lengths, recipe.micro_batch))

    def theirs(recipe: Recipe) -> WayWithPadding:
        way = peer.llamafactory_way(
            arguments.llamafactory,
            recipe,
            tokens_learned(recipe, rows.conversations),
            stage="sft",
            model_name_or_path=str(model_dir(arguments)),
            tokenized_path=str(conversations_dir(arguments)),
        )
        share = padding_share(rows.conversations, recipe.micro_batch, LLAMAFACTORY_MULTIPLE)
        return WayWithPadding(way, share)

    return {
        PACKED: ours(packed, rows.bins),
        PADDED.format(MICRO_BATCH, passes): ours(accumulated, rows.conversations, "--no-packing"),
        PADDED.format(number, 1): ours(one_pass, rows.conversations, "--no-packing"),
        LLAMAFACTORY.format(1, number): theirs(one_by_one),
        LLAMAFACTORY.format(MICRO_BATCH, passes): theirs(accumulated),
        LLAMAFACTORY.format(number, 1): theirs(one_pass),
    }


def recipe_for(
    arguments: argparse.Namespace, rows: Rows, lengths: Sequence[int], rows_per_step: int
) -> Recipe:
    """Return a recipe with one micro-batch per step; raise DataError if there are too few rows."""
    steps = arguments.steps or max(1, len(lengths) // rows_per_step)
    if steps * rows_per_step > len(lengths):
        raise DataError(
            f"{steps} steps take {steps * rows_per_step} rows, but {arguments.data} has "
            f"{len(lengths)}: lower --steps or prepare more data"
        )
    return Recipe(
        steps=steps,
        rows=rows_per_step,
        micro_batch=rows_per_step,
        block_size=rows.block_size,
        learning_rate=LEARNING_RATE,
        lora_rank=LORA_RANK,
        lora_alpha=LORA_ALPHA,
    )


def tokens_learned(recipe: Recipe, lengths: Sequence[int]) -> int:
    """Estimate the tokens in a run's rows from the mean length of all rows."""
    return round(recipe.steps * recipe.rows * sum(lengths) / len(lengths))


def padding_share(lengths: Sequence[int], micro_batch: int, multiple: int = 1) -> float:
    """Return the share of padding when random micro-batches are padded to their longest row."""
    order = random.Random(peer.SEED).sample(lengths, len(lengths))
    micro_batches = [
        order[start : start + micro_batch] for start in range(0, len(order), micro_batch)
    ]
    computed = sum(len(rows) * math.ceil(max(rows) / multiple) * multiple for rows in micro_batches)
    return 1 - sum(lengths) / computed


# Showing


def print_table(
    arguments: argparse.Namespace,
    rows: Rows,
    ways: Mapping[str, WayWithPadding],
    runs: Mapping[str, list[Run]],
) -> None:
    print(
        f"{PACKED}, divided by each way; {peer.CORES} cores, medians of {arguments.rounds} runs; "
        f"{rows.trained_share:.1%} of the tokens are trained\n"
    )
    head = ["way", "speed", "memory", "trained tokens/s", "tokens/s", "padding", "peak memory, GB",
            "first loss", "last loss"]  # fmt: skip
    body = []
    for title, of_way in runs.items():
        speed, memory = (peer.ratios(runs, field, title)[PACKED] for field in peer.FIELDS)
        tokens = peer.median(of_way, "tokens_per_second")
        body.append(
            [
                title,
                f"{speed:.2f}",
                f"{memory:.2f}",
                f"{tokens * rows.trained_share:,.0f}",
                f"{tokens:,.0f}",
                f"{ways[title].padding:.1%}",
                f"{peer.median(of_way, 'peak_gb'):.2f}",
                f"{of_way[0].losses[0]:.4f}",
                f"{of_way[0].losses[-1]:.4f}",
            ]
        )
    print(measuring.table(head, body))


def compared(runs: Mapping[str, list[Run]]) -> list[Ratio]:
    """Return the ratios of packed bins to every other way."""
    others = [title for title in runs if title != PACKED]
    return [ratio for title in others for ratio in peer.compared(runs, PACKED, title, "1.7")]


if __name__ == "__main__":
    run(main)
