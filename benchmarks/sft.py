"""Fine-tuning's speed: packed bins, padded rows, LLaMA-Factory 0.9.5; the same conversations.

How many trained tokens, those of the answers, are learned from in a second: by step 6 with the bins
that step 4 packed, by step 6 with --no-packing, and by LLaMA-Factory in `stage: sft` as it is by
default, without packing. All start from the demo's model after step 5 and have the same token ids
and labels: LLaMA-Factory loads step 4's conversations, each a row of its own, as its own
preprocessing would have saved them. It loads the model in float32, for it trains in the stored
dtype and fails on a CPU with float16. The recipe is the same: LoRA of rank 16 on all projections,
the embeddings frozen, AdamW, a cosine with the same warm-up, float32 on the CPU, nothing scored and
nothing saved in between.

A run is one pass over the data, less what fills no step. A step takes 8 bins, of 256 tokens in the
demo, or N conversations: the mean number in 8 bins, rounded up to a multiple of 8, in the demo
40. `8 x 5` are five micro-batches of 8 rows with gradient accumulation:

    step 6, packed             the 8 bins in one micro-batch, attention inside conversations
    step 6, padded, 8 x N/8    conversations padded to the longest of a micro-batch
    step 6, padded, N x 1      the same in one micro-batch
    LLaMA-Factory, 1 x N       no padding but to a multiple of 8 tokens, which it always does
    LLaMA-Factory, 8 x N/8     as step 6, padded
    LLaMA-Factory, N x 1       the same in one micro-batch

All but the first learn from the same conversations in the same order, and their losses agree.

Every run is a process of its own with all cores. The ways take turns, --rounds times; shown are
medians. Tokens per second are those of the Trainer's own `train_runtime`, so neither imports nor
loading and saving count; peak memory is that of the process from its start to its end, the saving
or merging included. A run's tokens are taken to be its rows times the mean of all rows, which
--steps of less than a pass makes an estimate. Padding is the share of the positions computed on
that hold no token, with the rows in a random order that is not that of the runs.

It is not only padding in which step 6 and LLaMA-Factory differ: LLaMA-Factory computes the logits
of all positions, step 6 those of trained tokens. Not measured are LLaMA-Factory's own packing, and
batches of rows of similar length, which neither makes by default.

LLaMA-Factory needs an environment of its own; benchmarks/llamafactory_data.py says which. Steps 1
to 5 of the demo must have run.

    python benchmarks/sft.py --llamafactory lf/bin/python --work-dir SCRATCH

Prints a table and a line of JSON. --work-dir keeps the logs and what LLaMA-Factory loads.
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

# Beside this file; they make the project's package importable.
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
LLAMAFACTORY_MULTIPLE = 8  # its collator pads to a multiple of so many tokens

PACKED = "step 6, packed"
PADDED = "step 6, padded, {} x {}"
LLAMAFACTORY = "LLaMA-Factory, {} x {}"


@dataclass(frozen=True)
class Rows:
    """Step 4's training rows: their numbers of tokens, packed and one by one."""

    bins: list[int]
    conversations: list[int]
    block_size: int
    trained_share: float  # of the tokens

    @property
    def conversations_per_step(self) -> int:
        """As many as BINS_PER_STEP bins hold, in whole micro-batches of MICRO_BATCH."""
        mean = BINS_PER_STEP * len(self.conversations) / len(self.bins)
        return MICRO_BATCH * math.ceil(mean / MICRO_BATCH)


@dataclass(frozen=True)
class WayWithPadding:
    """One way to train, and the share of padding in what it computes on."""

    way: Way
    padding: float


def main() -> None:
    arguments = parse_arguments()
    versions = peer.versions(arguments.llamafactory)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    # Libraries that this process must not load (peer.py says why) are loaded in another one.
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
        "--model", type=Path, default=DEMO / "step5_pt", help="step 5 (default: the demo's)"
    )
    parser.add_argument(
        "--data", type=Path, default=DEMO / "step4_data", help="step 4 (default: the demo's)"
    )
    peer.add_arguments(parser)
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each way (default: a pass over the data)"
    )
    arguments = parser.parse_args()
    peer.check_arguments(parser, arguments, [arguments.model, arguments.data])
    return arguments


# Preparing


def prepare(arguments: argparse.Namespace) -> Rows:
    """What LLaMA-Factory starts from, made anew each time; run in a process of its own."""
    import datasets

    from chatglm_ja.data import dataset
    from chatglm_ja.storage.inputs import open_artifact

    open_artifact(arguments.model, "step5_train_pt.py")
    data = open_artifact(arguments.data, "step4_prepare_data.py")

    model = model_dir(arguments)
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(arguments.model, model, ignore=shutil.ignore_patterns("adapter"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"dtype": "float32"}, indent=1)  # what it loads the weights as
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
    """All of a step's rows in one micro-batch; raises DataError when there are not enough rows."""
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
    """The tokens in a run's rows, whichever these are: of the mean length."""
    return round(recipe.steps * recipe.rows * sum(lengths) / len(lengths))


def padding_share(lengths: Sequence[int], micro_batch: int, multiple: int = 1) -> float:
    """Return the share of padding for rows in random order, padded in each micro-batch."""
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
    """Packed bins to every other way."""
    others = [title for title in runs if title != PACKED]
    return [ratio for title in others for ratio in peer.compared(runs, PACKED, title, "1.7")]


if __name__ == "__main__":
    run(main)
