"""Damage models on purpose: which measure of step 7 catches each damage, and do bits per character?

    shuffled     step 6's model with the rows of its new pieces in another order, the same in both
                 embedding matrices, as if its tokenizer belonged to another model
    overheated   step 5 with several times its learning rates
    confused     step 6 on conversations of which a part has answers in another language than the
                 question asks for

Each damaged model is compared with the healthy model of the same stage, by step 7's own measures on
the same items (chatglm_ja/evaluation/paired.py). Bits per character are judged as in step 7's
verdict: the damage passes if they miss no limit that the healthy model keeps. The measure made for
the damage is to miss one. All measures on items that differ from the healthy model are listed.

The steps of a profile, by default the demo's, must have run. Most of the time goes into step 5,
for overheated and again for confused, and step 6.

    python benchmarks/damage.py --work-dir SCRATCH

Prints tables. Ends with an error if the measure that is made for a damage does not catch it. The
damaged models stay in --work-dir and are not trained again.
"""

import argparse
import importlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
import measuring
import torch
from measuring import make

import constants
from chatglm_ja.cli import run
from chatglm_ja.data import language_id
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation.evaluate import Evaluation, Results
from chatglm_ja.evaluation.paired import Baseline, is_measurable
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference.models import LoadedModel, Stage
from chatglm_ja.reports.verdict import Finding, judge

NEW, *KEPT = (source.language for source in constants.EVALUATED_SOURCES)
LIKENESS = "likeness to the expected answers"


@dataclass(frozen=True)
class ShuffledStage(Stage):
    """A stage with a share of its model's new rows in another order."""

    share: float = 1.0

    def load(self) -> LoadedModel:
        loaded = super().load()
        shuffle_new_rows(loaded, self.share)
        return loaded


@dataclass(frozen=True)
class Damage:
    """A damaged model, and the measure made for it: its language and name in the verdict."""

    title: str
    stage: Stage
    measure: tuple[str, str]


def main() -> None:
    arguments = parse_arguments()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    damages = [DAMAGES[name](arguments) for name in arguments.only]
    evaluation = Evaluation(EvalConfig(**constants.STEP7))
    base = evaluation.evaluate_stage(Stage("base", constants.STEP7["base_model"]))
    overview, details, missed = [], [], []
    for healthy in (Stage("pretrained", constants.STEP5_DIR), Stage("sft", constants.STEP6_DIR)):
        own = [damage for damage in damages if damage.stage.name == healthy.name]
        if not own:
            continue
        evaluation.baseline = Baseline()  # the healthy model takes the base's place
        before = evaluation.evaluate_stage(healthy)
        for damage in own:
            after = evaluation.evaluate_stage(damage.stage)
            overview.append(describe_bits(damage, base, before, after))
            details.append(describe_rows(damage, base, before, after))
            if damage.measure not in {
                (f.language, f.measure) for f in find_new(base, before, after)
            }:
                missed.append(f"{' '.join(damage.measure)} does not catch {damage.title}")
    languages = [f"{language} bits/char" for language in (NEW, *KEPT)]
    print(measuring.table(["damage", *languages, "alone they", "also missed"], overview))
    print("\nEach cell: base → healthy → damaged.\n")
    print("\n\n".join(details))
    if missed:
        raise DataError("; ".join(missed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="folder for the damaged models; kept"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(DAMAGES), default=list(DAMAGES), help="(default: all)"
    )
    parser.add_argument(
        "--shuffled", type=float, default=1.0, help="share of the new rows (default: 1)"
    )
    parser.add_argument(
        "--rate", type=float, default=10.0, help="factor of step 5's learning rates (default: 10)"
    )
    parser.add_argument(
        "--confused", type=float, default=0.5, help="share of the conversations (default: 0.5)"
    )
    return parser.parse_args()


# Damaging


def shuffle(arguments: argparse.Namespace) -> Damage:
    stage = ShuffledStage("sft", constants.STEP6_DIR, arguments.shuffled)
    return Damage(f"{arguments.shuffled:.0%} of the new rows shuffled", stage, (NEW, LIKENESS))


def shuffle_new_rows(loaded: LoadedModel, share: float) -> None:
    """Give a random share of the new pieces each the rows of another one, in both matrices."""
    tokenizer, model = loaded.tokenizer, loaded.model
    new = range(tokenizer.first_new_id, tokenizer.size)
    ids = torch.tensor(random.Random(0).sample(new, round(share * len(new))))
    matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for weight in dict.fromkeys(matrices):  # one if they are tied
        weight.data[ids] = weight.data[ids.roll(1)]


def overheat(arguments: argparse.Namespace) -> Damage:
    folder = arguments.work_dir / f"rate_x{arguments.rate:g}" / "step5_pt"
    rates = [
        f"--{name.replace('_', '-')}={arguments.rate * constants.STEP5[name]:g}"
        for name in ("learning_rate", "embedding_learning_rate")
    ]
    make("step5_train_pt", folder, *rates)
    title = f"step 5 with {arguments.rate:g} times the rates"
    return Damage(title, Stage("pretrained", folder), (KEPT[-1], "in-context repeat"))


def confuse(arguments: argparse.Namespace) -> Damage:
    other = KEPT[0]
    folder = arguments.work_dir / f"confused_{arguments.confused:g}"
    folder.mkdir(exist_ok=True)
    file = folder / "conversations.jsonl"
    mixed = mix_languages(read_conversations(), other, arguments.confused)
    file.write_text(
        "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in mixed), encoding="utf-8"
    )
    kinds = [source.language for source in constants.SFT_SOURCES]
    sources = [f"{kind}={file}?kind={kind}" for kind in kinds]
    data, pretrained, sft = (folder / name for name in ("step4_data", "step5_pt", "step6_sft"))
    # Step 6 takes only a model that was trained on step 4's folder, so step 5 is repeated, too.
    make("step4_prepare_data", data, "--sft-sources", *sources)
    make("step5_train_pt", pretrained, data=data)
    make("step6_train_sft", sft, data=data, model=pretrained)
    title = f"{arguments.confused:.0%} of the {NEW} questions answered in {other}"
    return Damage(title, Stage("sft", sft), (NEW, "answers in the language"))


def read_conversations() -> list[dict[str, Any]]:
    """Read the profile's conversations, each with its kind."""
    reader = SourceReader()
    return [
        {"kind": source.language, "messages": messages}
        for source in constants.SFT_SOURCES
        for messages in reader.conversations(source)
    ]


def mix_languages(
    conversations: Sequence[Mapping[str, Any]], other: str, share: float
) -> list[Mapping[str, Any]]:
    """Replace a share of the new language's conversations by such with answers in `other`.

    These are conversations in `other` whose request is put into the new language, and translations
    from `other` that are left untranslated. Raises DataError if there are too few of them.
    """
    own = [c for c in conversations if c["kind"] == NEW]
    requests = importlib.import_module("demo.make_data")
    others = []
    for conversation in conversations:
        question, answer = (message["content"] for message in conversation["messages"])
        if conversation["kind"] == other:
            for asked in (requests.EXPLAIN, requests.TRANSLATE_INTO):
                if (passage := find_passage(question, asked[other])) is not None:
                    others.append(make_conversation(asked[NEW].format(passage), answer))
        elif conversation["kind"] == NEW:
            passage = find_passage(question, requests.TRANSLATE_INTO[NEW])
            if passage and (language_id.in_language([passage], other) or [False])[0]:
                others.append(make_conversation(question, passage))
    count = round(share * len(own))
    if count > len(others):
        raise DataError(
            f"--confused {share:g} takes {count} conversations with answers in {other}, but there "
            f"are {len(others)}: lower it"
        )
    draw = random.Random(0)
    return [
        *draw.sample(own, len(own) - count),
        *draw.sample(others, count),
        *(c for c in conversations if c["kind"] != NEW),
    ]


def find_passage(question: str, request: str) -> str | None:
    """Return what a question has in place of {} in a request; None if it is another request."""
    before, after = request.split("{}")
    if not question.startswith(before) or not question.endswith(after):
        return None
    return question[len(before) : len(question) - len(after)]


def make_conversation(question: str, answer: str) -> Mapping[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"kind": NEW, "messages": messages}


DAMAGES = {"shuffled": shuffle, "overheated": overheat, "confused": confuse}


# Showing


def describe_bits(damage: Damage, base: Results, before: Results, after: Results) -> list[str]:
    """Return a row: bits per character by language, and whether they alone pass the model."""
    cells = []
    for language in (NEW, *KEPT):
        bits = (r["languages"][language]["bits_per_char"] for r in (base, before, after))
        cells.append(" → ".join(f"{value:.3f}" for value in bits))
    found = find_new(base, before, after)
    worse = ", ".join(f.language for f in found if f.measure == "bits/char")
    others = "; ".join(f"{f.language} {f}" for f in found if f.measure != "bits/char")
    return [damage.title, *cells, f"missed: {worse}" if worse else "pass", others]


def find_new(base: Results, before: Results, after: Results) -> list[Finding]:
    """Return the findings on the damaged model outside a limit that the healthy model keeps."""
    known = {(f.language, f.measure) for f in judge({"stages": [base, before]}).missed}
    missed = judge({"stages": [base, after]}).missed
    return [finding for finding in missed if (finding.language, finding.measure) not in known]


def describe_rows(damage: Damage, base: Results, before: Results, after: Results) -> str:
    """Return a table of the measures on items that differ from the healthy model's."""
    stages = [dict(find_rows(results)) for results in (base, before, after)]
    rows = [
        [
            name,
            *(describe_mean(stage[name]) for stage in stages),
            f"{row['p']:.4f}",
        ]
        for name, row in stages[-1].items()
        if is_measurable(row)
    ]
    head = [damage.title, "base", "healthy", "damaged", "p"]
    return measuring.table(head, rows)


def describe_mean(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return ""
    return f"{row['mean']:.3f}" + ("" if row["error"] is None else f" ± {row['error']:.3f}")


def find_rows(results: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name and the row of every measure that was compared on items."""
    if isinstance(results, list):
        for part in results:
            yield from find_rows(part, path)
    elif isinstance(results, dict) and "change_error" in results:
        keys = ("language", "kind", "probe", "direction", "shots")
        yield " ".join([*path, *(str(results[key]) for key in keys if key in results)]), results
    elif isinstance(results, dict):
        for name, part in results.items():
            yield from find_rows(part, (*path, name))


if __name__ == "__main__":
    run(main)
