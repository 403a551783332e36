"""Compare training LoRA and the embeddings together with training one after the other.

The article reports that training both embedding matrices first, with the transformer frozen, and
LoRA afterwards, ended at a loss of 3.2, where training both together reached 2.7. This benchmark
repeats the comparison on the demo's model with the demo's learning rates. Step 5 trains

    together            both, its default, for one epoch
    in turn             the embeddings for half of the same tokens, then LoRA for the other half
    in turn, twice      the embeddings for all of the tokens, then LoRA for all of them again

Steps 1 to 4 of the demo must have run.

    python benchmarks/joint_training.py --work-dir SCRATCH

Prints the final bits per character of the validation texts and plots their curves in
joint_training.png in --work-dir. Finished runs in --work-dir are not repeated.
"""

import argparse
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

# In this folder; importing it makes the project's package importable.
import measuring
from measuring import step_command

from chatglm_ja.cli import run
from chatglm_ja.errors import DataError

LANGUAGES = ("ja", "zh", "en")
# Flags that freeze the transformer, and flags that freeze the embeddings.
EMBEDDINGS_ONLY = ("--learning-rate=0",)
LORA_ONLY = ("--no-train-embeddings", "--seed=43")  # another order of the blocks


@dataclass(frozen=True)
class Way:
    title: str
    curve: list[tuple[float, dict[str, float]]]  # tokens, bits per character by language


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="folder for runs and the plot; kept"
    )
    parser.add_argument("flags", nargs="*", help="additional flags for step 5, after --")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    together, steps = train(options, "together")
    half = f"--max-steps={steps // 2}"
    ways = [
        Way("together", together),
        Way("in turn", in_turn(options, "half", half)),
        Way("in turn, twice the tokens", in_turn(options, "whole")),
    ]
    ends = [("before", ways[0].curve[0]), *((way.title, way.curve[-1]) for way in ways)]
    rows = [
        [title, f"{tokens / 1e6:.2f}", *(f"{bits[language]:.3f}" for language in LANGUAGES)]
        for title, (tokens, bits) in ends
    ]
    print(measuring.table(["way", "M tokens", *LANGUAGES], rows))
    draw(ways, options.work_dir / "joint_training.png")


def in_turn(
    options: argparse.Namespace, name: str, *flags: str
) -> list[tuple[float, dict[str, float]]]:
    """Train the embeddings, then LoRA on the result; return both curves as one."""
    first, _ = train(options, f"{name}_embeddings", *EMBEDDINGS_ONLY, *flags)
    folder = options.work_dir / f"{name}_embeddings"
    second, _ = train(options, f"{name}_lora", f"--model={folder}", *LORA_ONLY, *flags)
    return first + [(first[-1][0] + tokens, bits) for tokens, bits in second[1:]]


def train(
    options: argparse.Namespace, name: str, *flags: str
) -> tuple[list[tuple[float, dict[str, float]]], int]:
    """Run step 5 into a folder of --work-dir; return its curve and its number of steps."""
    folder = options.work_dir / name
    command = step_command("step5_train_pt", folder)
    command += ["--evaluations=8", *flags, *options.flags]
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        raise DataError(f"step 5 failed: {' '.join(command)}")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    per_step = manifest["counts"]["tokens_per_step"]
    curve = [
        (
            entry["step"] * per_step,
            {language: entry[f"eval_{language}_bits_per_char"] for language in LANGUAGES},
        )
        for entry in history
        if f"eval_{LANGUAGES[0]}_bits_per_char" in entry
    ]
    return curve, manifest["counts"]["steps"]


def draw(ways: list[Way], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LANGUAGES), figsize=(11, 3.6), layout="constrained")
    titles = {"ja": "Japanese", "zh": "Chinese", "en": "English"}
    for axis, language in zip(axes, LANGUAGES, strict=True):
        for way in ways:
            tokens = [count / 1e6 for count, _ in way.curve]
            axis.plot(
                tokens, [b[language] for _, b in way.curve], marker="o", ms=3, label=way.title
            )
        axis.set(title=titles[language], xlabel="tokens, millions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per character, validation")
    axes[0].legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run(main)
