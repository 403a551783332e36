"""Step 7's results as tables: the last screen, results.md, and report.html with charts and answers.

results = {
    "base": what its Base.describe() says,
    "stages": [what evaluate.Evaluation measures of a stage],
    "segmentation": {language: Segmentation.row()},
    "samples": merging.sample_sentences(...),
    "curves": {name: history of the Trainer},
    "steps": {step: its manifest},
}

A measure that is added to evaluate.py gets its table here: a function, and an entry of SECTIONS.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ja import plots
from chatglm_ja.reports.render import Table, markdown_table, render_template
from chatglm_ja.storage.files import write_json
from chatglm_ja.vocabulary.merging import segmentation_table

log = logging.getLogger(__name__)

Results = Mapping[str, Any]

RESULTS_FILE = "results.json"
MARKDOWN_FILE = "results.md"
REPORT_FILE = "report.html"

# Titles of the loss curves, by stage.
TRAINING_TITLES = {
    "pretrained": "Step 5, continued pretraining",
    "sft": "Step 6, instructions",
}
LANGUAGE_NAMES = {"ja": "Japanese", "zh": "Chinese", "en": "English"}


def write_report(folder: Path, results: Results) -> None:
    """Write results.json, results.md and report.html."""
    write_json(folder / RESULTS_FILE, results)
    (folder / MARKDOWN_FILE).write_text(render_markdown(results), encoding="utf-8")
    (folder / REPORT_FILE).write_text(render_html(results), encoding="utf-8")


def write_benchmarks(folder: Path, stages: Sequence[Results]) -> None:
    """Write results.json and results.md of benchmarks that were run alone."""
    results = {"stages": list(stages)}
    write_json(folder / RESULTS_FILE, results)
    tables = [
        f"### {title}\n\n{markdown_table(head, rows)}\n"
        for title, (head, rows) in (
            ("llm-jp-eval", task_table(results)),
            ("lm-evaluation-harness", harness_table(results)),
        )
        if rows
    ]
    (folder / MARKDOWN_FILE).write_text("\n".join(tables), encoding="utf-8")


def summarize_benchmarks(folder: Path) -> str:
    """Return the last screen of benchmarks that were run alone: their tables, and the folder."""
    tables = (folder / MARKDOWN_FILE).read_text(encoding="utf-8")
    return "\n".join([*filter(None, [tables]), f"results: {folder}"])


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


def likeness_table(results: Results) -> Table:
    """Return the chrF of the answers to held-out questions, by kind."""
    return _compared_table(results, lambda stage: stage["likeness"], ("kind",), _show_number)


def probe_table(results: Results) -> Table:
    """Return the share of right answers, or of saved bits, in the probes of in-context learning."""
    head, rows = _compared_table(results, lambda stage: stage["probes"], ("language", "probe"))
    chances = [f"{row['chance']:.0%}" for row in results["stages"][0]["probes"]]
    return [*head[:2], "chance", *head[2:]], [
        [*row[:2], chance, *row[2:]] for row, chance in zip(rows, chances, strict=True)
    ]


def translation_table(results: Results) -> Table:
    """Return chrF by direction and number of examples."""
    return _compared_table(
        results, lambda stage: stage["translations"], ("direction", "shots"), _show_number
    )


RETENTION = {
    "bits_per_char": "bits/char of the base's answers",
    "in_language": "in the language",
    "ended": "ended by itself",
    "characters": "characters",
}


def retention_table(results: Results) -> Table:
    """Return how likely each stage finds the base's answers, and how it answers itself."""
    head: list[str] = []
    table = []
    for name, title in RETENTION.items():
        show = {"bits_per_char": _show_bits, "characters": _show_number}.get(name, _show_share)
        head, rows = _compared_table(results, _entries("retention", {name: title}), KEYS, show)
        table += rows
    return head, sorted(table, key=lambda row: row[0])  # stable: measures keep their order


CONFUSION = {
    "lines": "all lines in the language",
    "words": "no foreign word",
    "other_han": "Han outside JIS X 0208",
}


def confusion_table(results: Results) -> Table:
    """Return the pass rates of language confusion, and the share with Chinese forms of Han."""
    return _compared_table(results, _entries("confusion", CONFUSION), KEYS)


def han_table(results: Results) -> Table:
    """Return the last stage's Japanese answers that hold Han characters outside JIS X 0208."""
    rows = [
        [example["characters"], _shorten(example["question"]), _shorten(example["answer"])]
        for measured in results["stages"][-1]["confusion"].values()
        for example in measured["han_examples"]
    ]
    return ["characters", "question", "answer"], rows


def choice_table(results: Results) -> Table:
    """Return the accuracy at multiple choice by language and metric."""
    from chatglm_ja.evaluation.multiple_choice import METRICS  # imports torch

    def rows_of(stage: Results) -> list[dict[str, Any]]:
        return [
            {
                "language": language,
                "chance": f"{row['chance']:.0%}",
                "choice": METRICS[name].title,
                **compared,
            }
            for language, row in stage["choices"].items()
            for name, compared in row["compared"].items()
        ]

    return _compared_table(results, rows_of, ("language", "chance", "choice"))


KEYS = ("language", "measure")


def _entries(part: str, titles: Mapping[str, str]) -> Callable[[Results], list[dict[str, Any]]]:
    """Return a function that lists what a stage measured by language, under these titles."""

    def rows_of(stage: Results) -> list[dict[str, Any]]:
        return [
            {"language": language, "measure": title, **row[name]}
            for language, row in stage[part].items()
            for name, title in titles.items()
            if row[name]
        ]

    return rows_of


def _show_share(value: float) -> str:
    return f"{100 * value:.0f}"


def _show_number(value: float) -> str:
    return f"{value:.1f}"


def _show_bits(value: float) -> str:
    return f"{value:.2f}"


def _compared_table(
    results: Results,
    rows_of: Callable[[Results], Sequence[Mapping[str, Any]]],
    keys: Sequence[str],
    show: Callable[[float], str] = _show_share,
) -> Table:
    """Return a table of measures by stage, whose rows are what paired.Baseline.compare returned.

    A cell is mean ± standard error; then the difference from the base, or ≈ where there is none
    that can be measured.
    """
    from chatglm_ja.evaluation.paired import is_measurable

    stages = results["stages"]
    rows = []
    for measured in zip(*(rows_of(stage) for stage in stages), strict=True):
        cells = [str(measured[0][key]) for key in keys]
        cells.append(str(max(entry["items"] for entry in measured)))
        for entry in measured:
            if entry["mean"] is None:
                cells.append("")
                continue
            cell = show(entry["mean"])
            if entry["error"] is not None:
                cell += f" ± {show(entry['error'])}"
            if is_measurable(entry):
                change = show(entry["change"])
                cell += f" ({change if change.startswith('-') else '+' + change})"
            elif entry["change"] is not None:
                cell += " (≈)"
            cells.append(cell)
        rows.append(cells)
    return [*keys, "items", *(stage["name"] for stage in stages)], rows


def _shorten(text: str, width: int = 120) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= width else text[: width - 1] + "…"


def task_table(results: Results) -> Table:
    """Return a row for every data set of llm-jp-eval and metric, with standard errors."""
    return _benchmark_table(results["stages"], "tasks", ["task", "metric", "questions", "shots"])


def harness_table(results: Results) -> Table:
    """Return a row for every task and metric of lm-evaluation-harness, with standard errors."""
    return _benchmark_table(results["stages"], "harness", ["task", "metric"])


def _benchmark_table(stages: Sequence[Results], key: str, columns: Sequence[str]) -> Table:
    rows = []
    for measured in zip(*(stage[key] for stage in stages), strict=True):
        row = [str(measured[0][column]) for column in columns]
        for entry in measured:
            error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.3f}"
            row.append(f"{entry['value']:.3f}{error}")
        rows.append(row)
    return [*columns, *(stage["name"] for stage in stages)], rows


COMPARED = (
    "In brackets: the difference from the base on the same items; ≈: no measurable difference "
    "(p ≥ 0.01). ±: standard error."
)

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
        "Likeness to the expected answers",
        "chrF (0 to 100) of the sampled answers to held-out questions and the answers that go with "
        f"them. {COMPARED}",
        likeness_table,
    ),
    (
        "In-context probes",
        "What a model does with a text that it has just read, which bits per character hardly "
        "shows. The right answer is in the text, so no knowledge is needed. copy and reverse: a "
        "list of words in the same or the opposite order. recall N: the value of a key, in N "
        "tokens of keys and values. labels: lines of two languages, each with an arbitrary "
        "letter. Right answers in percent. repeat: the percentage of a passage's bits that the "
        f"model saves where it reads the passage for the second time. {COMPARED}",
        probe_table,
    ),
    (
        "Translation",
        "chrF (0 to 100) of held-out lines, after no and after a few examples in the same text. "
        f"{COMPARED}",
        translation_table,
    ),
    (
        "Chat retention",
        "The base's sampled answers in the languages that it knew: how many bits per character "
        "each stage needs for them (the difference from the base is how far its answers have "
        f"moved), and in percent how the stage answers the same questions itself. {COMPARED}",
        retention_table,
    ),
    (
        "Language confusion",
        "Sampled answers in percent. All lines in the language: answers of which every line of "
        "some length is in the question's language. No foreign word: of these, answers without an "
        "English word (in lower case, four letters or more, not in the question) or another "
        "script. Han outside JIS X 0208: Japanese answers with Chinese forms such as 设置; fewer "
        f"are better. {COMPARED}",
        confusion_table,
    ),
    (
        "Han characters outside JIS X 0208",
        "The last model's Japanese answers that hold them.",
        han_table,
    ),
    (
        "Multiple choice",
        "Percent of the questions whose correct choice is the likeliest, the likeliest per "
        f"character, or the one whose likelihood gains most from the question. {COMPARED}",
        choice_table,
    ),
    (
        "llm-jp-eval",
        "Answers to the data sets of --tasks: mean over the questions ± standard error. Shots: the "
        "examples before each question.",
        task_table,
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
    """Return a sentence on what continued pretraining changed in every language, if it was done."""
    stages = {stage["name"]: stage["languages"] for stage in results["stages"]}
    if "pretrained" not in stages:
        return "The model was fine-tuned without continued pretraining"
    changes = []
    for language, before in stages["resized"].items():
        old, new = before["bits_per_char"], stages["pretrained"][language]["bits_per_char"]
        changes.append(f"{language} {old:.3f} -> {new:.3f} ({new / old - 1:+.1%})")
    changed = ", ".join(changes)
    return f"Continued pretraining changed the resized model's bits per character: {changed}"


def summarize(results: Results, report: Path) -> str:
    """Return step 7's last screen: a table, then what was gained, what it cost, and the report."""
    gains, costs = [], []
    last = results["stages"][-1]
    for language, base in results["stages"][0]["languages"].items():
        score = last["languages"][language]
        name = LANGUAGE_NAMES.get(language, language)
        old, new = base["bits_per_char"], score["bits_per_char"]
        change = f"{new / old - 1:+.1%}"
        if new < old:
            gain = f"{name} {old:.3f} -> {new:.3f} bits/char ({change})"
            old, new = base["tokens_per_char"], score["tokens_per_char"]
            if old != new:
                gain += f", {new:.2f} instead of {old:.2f} tokens/char"
            gains.append(gain)
        else:
            costs.append(f"{name} {change}")
    cost = f"{', '.join(costs)} bits/char" if costs else "no language has more bits/char"
    # Sampled answers to the held-out questions, or if there are none, to those of --prompts.
    rows = [row for row in last["held_out"] if row["way"] == "sampled"]
    rows = rows or [row for name, row in last["answering"].items() if name == "sampled"]
    shares = []
    for key, phrase in (
        ("in_language", "in the question's language"),
        ("ended", "end by themselves"),
    ):
        counted = [row for row in rows if row[key] is not None]
        if total := sum(row["questions"] for row in counted):
            share = sum(row[key] * row["questions"] for row in counted) / total
            shares.append(f"{share:.0%} {phrase}")
    return (
        f"{markdown_table(*stage_table(results))}\n\n"
        f"gained: {'; '.join(gains) or 'no language has fewer bits/char'}\n"
        f"cost: {cost}; sampled answers: {', '.join(shares) or 'none'}\n"
        f"report: {report}"
    )


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
        base=results["base"],
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
