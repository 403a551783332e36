"""Does a new vocabulary pay? The same training with new pieces and without, on a real model.

Runs steps 1 to 5 in two arms, the profile's own and one with `--max-new-pieces 0`, with several
numbers of optimizer steps, each a whole run with its own warm-up and decay. Scores all models on
the same held-out pages. Prints a Markdown table and draws the curves: Japanese bits per character
by compute, and by the Japanese text that was read. A step has as many tokens in both arms, so that
the arm without new pieces reads less text in it.

    CHATGLM_JA_PROFILE=smollm2 python benchmarks/new_pieces.py --work-dir SCRATCH

The base model of the profile must be there. Finished runs in SCRATCH are taken as they are.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# In this folder; importing it makes the project's package importable.
from measuring import PROJECT, mean_and_error, table

import constants
from chatglm_ja import plots
from chatglm_ja.bases import families
from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.bases.shape import read_shape
from chatglm_ja.cli import run
from chatglm_ja.data import corpus, dataset
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.inference import models
from chatglm_ja.storage.manifest import read_manifest
from chatglm_ja.training import costs
from chatglm_ja.training.settings import TrainingConfig

ARMS = {"with new pieces": [], "without": ["--max-new-pieces=0"]}
WITH_BASE = ("step1_train_tokenizer", "step2_merge_tokenizer", "step3_resize_model")


@dataclass(frozen=True)
class Point:
    """A trained model: its FLOPs, the Japanese characters it read, its held-out bits/character."""

    steps: int
    flops: float
    characters: float
    bits: Mapping[str, float]


def run_step(root: Path, name: str, *flags: str) -> None:
    """Run a step with another artifacts' root; the base is read from the profile's own."""
    base = [f"--base-model={constants.BASE_MODEL_DIR}"] if name in WITH_BASE else []
    command = [sys.executable, str(PROJECT / f"{name}.py"), *base, *flags]
    environment = {**os.environ, "CHATGLM_JA_ARTIFACTS": str(root)}
    subprocess.run(command, check=True, env=environment)


def read_per_step(data: Path, tokenizer: ModelTokenizer, global_batch_size: int) -> float:
    """Return the Japanese characters in a step's rows, on average."""
    rows = dataset.load_rows(data, "pretrain", "train")
    titles = dataset.source_titles(data, "pretrain")
    characters = 0
    for document in dataset.unpack_rows(rows):
        (source,) = document["sources"]
        if dataset.title_language(titles[source]) == constants.LANGUAGES[0]:
            characters += len(tokenizer.decode(document["input_ids"]))
    return global_batch_size * characters / len(rows)


def train(root: Path, steps: int, seed: int, texts: Mapping[str, list[str]]) -> Point:
    """Train with this number of steps (-1: an epoch), unless that is done; score the model."""
    folder = root / constants.PROFILE / f"step5_{steps}_{seed}"
    flags = (f"--max-steps={steps}", f"--seed={seed}", f"--output-dir={folder}", "--evaluations=0")
    run_step(root, "step5_train_pt", *flags)
    data = root / constants.PROFILE / "step4_data"
    paths = {"model": folder, "data": data, "output_dir": folder}
    config = TrainingConfig(**constants.STEP5 | paths)
    shape = read_shape(folder)
    lengths = dataset.load_rows(data, "pretrain", "train")[:500]["lengths"]
    flops = costs.flops_per_token(
        shape, config.count_parameters(shape), config.trained_linears(shape),
        costs.mean_context(lengths),
    )  # fmt: skip
    per_step = read_per_step(data, families.load_tokenizer(folder), config.global_batch_size)
    scorer = Scorer(models.load_model(folder), constants.EVALUATION["window"], batch_size=8)
    bits = {name: scorer.score_texts(group).bits_per_char for name, group in texts.items()}
    manifest = read_manifest(folder)
    assert manifest is not None
    done = int(manifest.counts["steps"])
    tokens = done * config.global_batch_size * config.block_size
    return Point(done, flops * tokens, done * per_step, bits)


def draw(curves: Mapping[str, list[list[Point]]], path: Path) -> None:
    """Draw bits per character of the first language by compute and by text; bars: all seeds."""
    figure, axes = plots.make_figure(9, 3.4, ncols=2)
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    new = constants.LANGUAGES[0]
    for label, points in curves.items():
        for axis, key, unit in zip(axes, ("flops", "characters"), (1e12, 1e3), strict=True):
            x = [getattr(seeds[0], key) / unit for seeds in points]
            values = [[point.bits[new] for point in seeds] for seeds in points]
            means = list(map(statistics.fmean, values))
            spread = [
                [m - min(v) for m, v in zip(means, values, strict=True)],
                [max(v) - m for m, v in zip(means, values, strict=True)],
            ]
            axis.errorbar(x, means, yerr=spread, marker="o", capsize=3, label=label)
    for axis, name in zip(axes, ("TFLOP", "thousand Japanese characters read"), strict=True):
        axis.set(xlabel=name, xscale="log", ylabel="bits per Japanese character")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    plots.save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[32, 128, -1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    options = parser.parse_args()
    texts = {
        language: corpus.take_characters(documents, constants.EVALUATION["max_chars"])
        for language, documents in SourceReader()
        .texts_by_language(constants.EVALUATED_SOURCES)
        .items()
    }
    head = ["", "steps", "TFLOP", "characters read", *(f"{name} bits/char" for name in texts)]
    curves: dict[str, list[list[Point]]] = {}
    rows = []
    for arm, flags in ARMS.items():
        root = options.work_dir / arm.replace(" ", "_")
        if not flags:
            run_step(root, "step1_train_tokenizer")
        run_step(root, "step2_merge_tokenizer", *flags)
        run_step(root, "step3_resize_model")
        run_step(root, "step4_prepare_data", "--sft-examples=0")
        for steps in options.steps:
            points = [train(root, steps, seed, texts) for seed in options.seeds]
            curves.setdefault(arm, []).append(points)
            cells = [mean_and_error([point.bits[name] for point in points], 3) for name in texts]
            first = points[0]
            sizes = (str(first.steps), f"{first.flops / 1e12:.0f}", f"{first.characters:,.0f}")
            rows.append([arm, *sizes, *cells])
    print(table(head, rows))
    draw(curves, options.work_dir / "new_pieces.png")


if __name__ == "__main__":
    run(main)
