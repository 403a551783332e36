"""Recipes of steps 5 and 6, compared on a profile: what the finished model gained and what it cost.

Trains each recipe with each seed and measures the results as step 7 does. A recipe is named below;
its flags are added to the profile's settings. The steps before must have run; finished runs in
SCRATCH are taken as they are.

    python benchmarks/recipe.py --work-dir SCRATCH --seeds 42 43 44
    python benchmarks/recipe.py --work-dir SCRATCH --only default replay-0.4 --seeds 42

Prints a Markdown table of means and standard errors over the seeds:

text           bits per character of held-out pages, by language, after step 5 and after step 6
sampled        shares of sampled answers to held-out questions, over the languages: in the language
               of the question, ended by themselves
looped         4-grams of greedy answers that repeat an earlier one
likeness       chrF of sampled answers to the expected ones, over all kinds
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

# In this folder; importing it makes the project's package importable.
import measuring

import constants
from chatglm_ja.cli import run
from chatglm_ja.evaluation.evaluate import Evaluation, Results
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference.models import Stage
from chatglm_ja.storage.files import read_json, write_json


@dataclass(frozen=True)
class Recipe:
    """Flags of step 5 and of step 6."""

    pretraining: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()


RECIPES = {
    "default": Recipe(),
    "cosine": Recipe(("--decay-ratio=1",), ("--decay-ratio=1",)),
    "cosine, replay-0": Recipe(("--decay-ratio=1",), ("--decay-ratio=1", "--replay=0")),
    "decay-0.1": Recipe(("--decay-ratio=0.1",)),
    "decay-0.5": Recipe(("--decay-ratio=0.5",)),
    "replay-0": Recipe(tuning=("--replay=0",)),
    "replay-0.2": Recipe(tuning=("--replay=0.2",)),
    "replay-0.4": Recipe(tuning=("--replay=0.4",)),
    "replay-0.8": Recipe(tuning=("--replay=0.8",)),
}


class Bench:
    """Runs recipes in a folder and measures their models, each once."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self._evaluation: Evaluation | None = None

    def measure_recipe(self, name: str, seed: int) -> dict[str, float]:
        """Return the columns of the table for one seed."""
        recipe = RECIPES[name]
        pretrained = self.work_dir / f"pt {' '.join(recipe.pretraining)} {seed}"
        tuned = self.work_dir / f"{name} {seed}"
        seeded = f"--seed={seed}"
        measuring.make("step5_train_pt", pretrained, seeded, *recipe.pretraining)
        measuring.make("step6_train_sft", tuned, seeded, *recipe.tuning, model=pretrained)
        before = self._measure("pretrained", pretrained)
        return summarize(before, self._measure("sft", tuned))

    def _measure(self, stage: str, folder: Path) -> Results:
        path = folder.with_name(folder.name + ".json")
        if not path.exists():
            if self._evaluation is None:
                self._evaluation = Evaluation(EvalConfig(**constants.STEP7))
                self._evaluation.evaluate_stage(Stage("base", constants.STEP7["base_model"]))
            write_json(path, self._evaluation.evaluate_stage(Stage(stage, folder)))
        results: Results = read_json(path)
        return results


def summarize(before: Results, after: Results) -> dict[str, float]:
    """Return the table's columns from the measures after step 5 and after step 6."""
    languages = list(after["languages"])
    columns = {
        f"{language} bits/char, step {step}": results["languages"][language]["bits_per_char"]
        for step, results in ((5, before), (6, after))
        for language in languages
    }

    def mean(way: str, key: str) -> float:
        rows = (r for r in after["held_out"] if r["way"] == way and r["kind"] in languages)
        return statistics.fmean(row[key] for row in rows)

    columns["sampled in the language"] = mean("sampled", "in_language")
    columns["sampled ended"] = mean("sampled", "ended")
    columns["looped"] = mean("greedy", "repeated")
    columns["likeness"] = statistics.fmean(row["mean"] for row in after["likeness"])
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for models; kept")
    parser.add_argument(
        "--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="(default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.work_dir)
    rows: list[list[str]] = []
    head: list[str] = []
    for name in arguments.only:
        seeds: list[dict[str, float]] = [bench.measure_recipe(name, s) for s in arguments.seeds]
        head = ["recipe", *seeds[0]]
        columns = ([seed[key] for seed in seeds] for key in seeds[0])
        rows.append([name, *(measuring.mean_and_error(values, 3) for values in columns)])
    print(measuring.table(head, rows))


if __name__ == "__main__":
    run(main)
