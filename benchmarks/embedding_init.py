"""Compare initializations of the new embedding rows at step 0 and after the same training.

Prints a Markdown table: bits per character on the demo's held-out pages for each --init and
--output-bias. Steps 1, 2 and 4 of the demo must have run (`make demo`). Steps 3 and 5 run here, in
a temporary folder.

    python benchmarks/embedding_init.py --max-steps 100
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

# In this folder; importing it makes the project's package importable.
from measuring import step_command

import constants
from chatglm_ja.cli import run
from chatglm_ja.data import corpus
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.inference import models

WAYS = [
    ("random", 0.0),
    ("mean", 0.0),
    ("subtoken_mean", 0.0),
    ("mean", 0.25),
    ("subtoken_mean", 0.25),
    ("subtoken_mean", 0.5),
    ("subtoken_mean", 1.0),
]


MAX_CHARS = 40_000  # per language


def score(folder: Path, texts: dict[str, list[str]]) -> list[str]:
    """Return the bits per character of a model folder, formatted, for each language."""
    scorer = Scorer(models.load_model(folder), constants.EVALUATION["window"], batch_size=16)
    return [f"{scorer.score_texts(group).bits_per_char:.3f}" for group in texts.values()]


def step(name: str, output: Path, *flags: str, **paths: Path) -> None:
    command = [*step_command(name, output, **paths), *flags]
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--max-steps", type=int, default=100, help="optimizer steps of step 5 (default: 100)"
    )
    steps = parser.parse_args().max_steps
    texts = {
        language: corpus.take_characters(documents, MAX_CHARS)
        for language, documents in SourceReader()
        .texts_by_language(constants.HELD_OUT_SOURCES)
        .items()
    }
    columns = [f"{name}, {when}" for when in ("step 0", f"step {steps}") for name in texts]
    print("| init | output bias | " + " | ".join(columns) + " |")
    print("|---|---:" + "|---:" * len(columns) + "|", flush=True)
    for init, bias in WAYS:
        with tempfile.TemporaryDirectory() as name:
            resized, trained = Path(name) / "resized", Path(name) / "trained"
            step("step3_resize_model", resized, f"--init={init}", f"--output-bias={bias}")
            flags = [f"--max-steps={steps}", "--evaluations=2"]
            step("step5_train_pt", trained, *flags, model=resized)
            row = [f"`{init}`", f"{bias:g}", *score(resized, texts), *score(trained, texts)]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    run(main)
