"""Step 7's results as tables: the last screen, results.md, and report.html with charts and answers.

results = {
    "stages": [what evaluate.Evaluation measures of a stage],
    "segmentation": {language: Segmentation.row()},
    "samples": segmentation.sample_sentences(...),
    "curves": {name: history of the Trainer},
    "steps": {step: its manifest},
}

A measure that is added to evaluate.py gets its table here: a function, and an entry of SECTIONS.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ja import plots
from chatglm_ja.reports.render import Table, markdown_table, render_template
from chatglm_ja.storage.files import write_json
from chatglm_ja.vocabulary.segmentation import segmentation_table

Results = Mapping[str, Any]

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"

LANGUAGE_NAMES = {"ja": "Japanese", "zh": "Chinese", "en": "English"}


def write_report(folder: Path, results: Results) -> None:
    """Write results.json, results.md and report.html."""
    write_json(folder / RESULTS_FILE, results)
    (folder / "results.md").write_text(render_markdown(results), encoding="utf-8")
    (folder / REPORT_FILE).write_text(render_html(results), encoding="utf-8")


def stage_table(results: Results) -> Table:
    """Return bits per character of every stage and language, with the change from the base."""
    return _language_table(results, "bits_per_char", "bits/char", show_change=True)


def speed_table(results: Results) -> Table:
    """Return tokens per character, and characters per second of a single answer."""
    head, rows = _language_table(results, "tokens_per_char", "tokens/char")
    speed_head, speeds = _language_table(results, "chars_per_second", "chars/s", digits=0)
    pairs = zip(rows, speeds, strict=True)
    return [*head, *speed_head[1:]], [[*row, *speed[1:]] for row, speed in pairs]


def _language_table(
    results: Results, key: str, unit: str, *, digits: int = 3, show_change: bool = False
) -> Table:
    stages = results["stages"]
    languages = list(stages[0]["languages"])
    rows = []
    for stage in stages:
        row = [stage["name"]]
        for language in languages:
            value, base = (s["languages"][language][key] for s in (stage, stages[0]))
            change = f" ({value / base - 1:+.1%})" if show_change and stage != stages[0] else ""
            row.append(f"{value:,.{digits}f}{change}")
        rows.append(row)
    return ["stage", *(f"{language} {unit}" for language in languages)], rows


def distance_table(results: Results) -> Table:
    """Return how far each stage's predictions over the base's ids are from the base's."""
    rows = []
    for stage in results["stages"]:
        for language, row in stage["kept"].items():
            worst = row["largest_difference"]
            difference = "identical" if worst == 0 else f"{worst:.3g}"
            divergence = f"{row['divergence_bits']:.3f}"
            rows.append([stage["name"], language, f"{row['tokens']:,}", difference, divergence])
    return ["stage", "language", "tokens", "largest difference of logits", "divergence, bits"], rows


ANSWER_MEASURES = [
    "questions", "in the language", "ended by itself", "repeated 4-grams", "longest loop"
]  # fmt: skip


def answer_table(results: Results) -> Table:
    """Return how every stage answers the questions of --prompts, by decoding."""
    rows = [
        [stage["name"], decoding, *_answer_cells(row)]
        for stage in results["stages"]
        for decoding, row in stage["answering"].items()
    ]
    return ["stage", "decoding", *ANSWER_MEASURES], rows


def held_out_table(results: Results) -> Table:
    """Return how the last stage answers the held-out questions, by kind and decoding."""
    held_out = results["stages"][-1]["held_out"]
    rows = [[row["kind"], row["way"], *_answer_cells(row)] for row in held_out]
    return ["kind", "decoding", *ANSWER_MEASURES], rows


def _answer_cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["questions"]),
        "" if row["in_language"] is None else f"{row['in_language']:.0%}",
        f"{row['ended']:.0%}",
        f"{row['repeated']:.0%}",
        str(row["longest_loop"]),
    ]


def choice_table(results: Results) -> Table:
    """Return the accuracy at multiple choice, with its standard error in percentage points."""
    from chatglm_ja.evaluation.multiple_choice import METRICS  # imports torch

    rows = []
    for stage in results["stages"]:
        for language, row in stage["choices"].items():
            count = row["questions"]
            cells = [stage["name"], language, str(count), f"{row['chance']:.0%}"]
            for score in METRICS:
                error = math.sqrt(row[score] * (1 - row[score]) / count)
                cells.append(f"{row[score]:.0%} ± {100 * error:.0f}")
            rows.append(cells)
    return [
        "stage",
        "language",
        "questions",
        "chance",
        *(metric.title for metric in METRICS.values()),
    ], rows


def harness_table(results: Results) -> Table:
    """Return a row for every task and metric of lm-evaluation-harness, with standard errors."""
    stages = results["stages"]
    rows = []
    for index, first in enumerate(stages[0]["harness"]):
        row = [first["task"], first["metric"]]
        for stage in stages:
            measured = stage["harness"][index]
            error = "" if measured["stderr"] is None else f" ± {measured['stderr']:.3f}"
            row.append(f"{measured['value']:.3f}{error}")
        rows.append(row)
    return ["task", "metric", *(stage["name"] for stage in stages)], rows


# Title, explanation and table of everything that step 7 measures. A table without rows is left out;
# {sources} stands for the names of the held-out texts.
SECTIONS: list[tuple[str, str, Callable[[Results], Table]]] = [
    (
        "Bits per character",
        "Held-out text{sources}: lower is better, and values are comparable between vocabularies. "
        "In brackets: the change from the base. The resized model has the new pieces but has not "
        "been trained yet.",
        stage_table,
    ),
    (
        "Bits per byte",
        "The same text, divided by its length in UTF-8 bytes.",
        lambda results: _language_table(results, "bits_per_byte", "bits/byte", show_change=True),
    ),
    (
        "Tokens and speed",
        "Characters per second of a single answer: its tokens per second divided by the tokens per "
        "character of the held-out text. Timed once per vocabulary size, so other load on this "
        "machine affects it.",
        speed_table,
    ),
    (
        "Segmentation",
        "Held-out lines that the merged tokenizer segments as the base's does.",
        lambda results: segmentation_table(results["segmentation"]),
    ),
    (
        "Distance from the base",
        "The base and each stage read the beginnings of the held-out texts, tokenized by the base. "
        "Compared are the logits of the base's ids and the distributions of the next token "
        "(Kullback-Leibler divergence; probability of new pieces counts as lost).",
        distance_table,
    ),
    (
        "Answers",
        "Answers to the questions of --prompts. In the language: share of the answers that are in "
        "the question's language, without those to questions about code. Repeated 4-grams: share "
        "of the 4-grams of words (Japanese and Chinese: of characters) that the answer already "
        "contained, averaged over the answers. Longest loop: the most words in a stretch that "
        "repeats itself three or more times.",
        answer_table,
    ),
    (
        "Answers to held-out questions",
        "Answers of the fine-tuned model, by kind of question.",
        held_out_table,
    ),
    (
        "Multiple choice",
        "Share of the questions whose correct choice is the likeliest, the likeliest per "
        "character, or the one whose likelihood gains most from the question; ± standard error.",
        choice_table,
    ),
    ("lm-evaluation-harness", "Values ± standard error.", harness_table),
]


def _measured_sections(results: Results) -> list[tuple[str, str, list[str], list[list[str]]]]:
    arguments = results["steps"].get("step7_eval", {}).get("arguments", {})
    names = ", ".join(source["name"] for source in arguments.get("sources", []))
    sources = f" ({names})" if names else ""
    sections = [
        (title, explanation.format(sources=sources), *make_table(results))
        for title, explanation, make_table in SECTIONS
    ]
    return [section for section in sections if section[-1]]


def describe_pretraining(results: Results) -> str:
    """Return a sentence on what continued pretraining changed in every language."""
    stages = {stage["name"]: stage["languages"] for stage in results["stages"]}
    changes = []
    for language, before in stages["resized"].items():
        old, new = before["bits_per_char"], stages["pretrained"][language]["bits_per_char"]
        changes.append(f"{language} {old:.3f} -> {new:.3f} ({new / old - 1:+.1%})")
    changed = ", ".join(changes)
    return f"Continued pretraining changed the resized model's bits per character: {changed}"


def summarize(results: Results, report: Path) -> str:
    """Return step 7's last screen: a table, then what was gained, what it cost, and the report."""
    gains, costs = [], []
    for language, base in results["stages"][0]["languages"].items():
        last = results["stages"][-1]["languages"][language]
        name = LANGUAGE_NAMES.get(language, language)
        old, new = base["bits_per_char"], last["bits_per_char"]
        change = f"{new / old - 1:+.1%}"
        if new < old:
            gain = f"{name} {old:.3f} -> {new:.3f} bits/char ({change})"
            old, new = base["tokens_per_char"], last["tokens_per_char"]
            if old != new:
                gain += f", {new:.2f} instead of {old:.2f} tokens/char"
            gains.append(gain)
        else:
            costs.append(f"{name} {change}")
    cost = f"{', '.join(costs)} bits/char" if costs else "no language has more bits/char"
    return "\n".join(
        [
            markdown_table(*stage_table(results)),
            "",
            f"gained: {'; '.join(gains) or 'no language has fewer bits/char'}",
            f"cost: {cost}; {_describe_answers(results)}",
            f"report: {report}",
        ]
    )


def _describe_answers(results: Results) -> str:
    """Return a phrase on the last stage's sampled answers, of held-out questions if it has any."""
    last = results["stages"][-1]
    rows = [row for row in last["held_out"] if row["way"] == "sampled"]
    rows = rows or [last["answering"]["sampled"]]

    def share(key: str) -> str:
        counted = [row for row in rows if row[key] is not None]
        total = sum(row["questions"] for row in counted)
        return f"{sum(row[key] * row['questions'] for row in counted) / total:.0%}"

    in_language = any(row["in_language"] is not None for row in rows)
    language = f"{share('in_language')} in the question's language, " if in_language else ""
    return f"sampled answers: {language}{share('ended')} end by themselves"


def render_markdown(results: Results) -> str:
    """Return all tables as Markdown that also reads well in a terminal."""
    return render_template(
        "results.md.jinja",
        pretraining=describe_pretraining(results),
        sections=_measured_sections(results),
    )


def render_html(results: Results) -> str:
    """Return the whole report as an HTML page."""
    steps = []
    for step, manifest in results["steps"].items():
        settings = [
            [name, json.dumps(value, ensure_ascii=False)]
            for name, value in manifest["arguments"].items()
        ]
        if manifest["fingerprint"]:  # step 7 has none before it is published
            settings.append(["fingerprint of the result", manifest["fingerprint"]])
        steps.append((step, settings))
    last = list(results["steps"].values())[-1]
    return render_template(
        "report.html.jinja",
        pretraining=describe_pretraining(results),
        sections=_measured_sections(results),
        samples=results["samples"],
        curves=[_draw_losses(name, history) for name, history in results["curves"].items()],
        stages=results["stages"],
        steps=steps,
        lineage=list(last["lineage"].items()),
        versions=", ".join(f"{name} {version}" for name, version in last["versions"].items()),
    )


def _draw_losses(name: str, history: Sequence[Mapping[str, Any]]) -> str:
    """Draw training and validation loss over the steps; return SVG."""
    # Imports torch, which the last screen of a finished step does not need.
    from chatglm_ja.training.progress import draw_losses

    figure, axes = plots.make_figure(7, 3.2)
    draw_losses(axes, history)
    axes.set(title=name, xlabel="optimizer steps", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return plots.to_svg(figure)
