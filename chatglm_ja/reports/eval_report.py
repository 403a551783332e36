"""Step 7's report: results.json, results.md, report.html, and the last screen.

results = {
    "base": what its Base.describe() says,
    "model": {"name": the last stage's folder, "date": of its manifest},
    "stages": [what evaluate.Evaluation measures of a stage],
    "segmentation": {language: Segmentation.row()},
    "samples": merging.sample_sentences(...),
    "curves": {name: history of the Trainer},
    "steps": {step: its manifest},
}

All open with the verdict (verdict.py); the page has a picture of it, the tables of eval_tables.py,
the curves of training, and the answers of the stages side by side.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ja import plots
from chatglm_ja.reports.eval_tables import (
    Results,
    harness_table,
    measured_sections,
    stage_table,
    task_table,
)
from chatglm_ja.reports.render import markdown_table, render_template
from chatglm_ja.reports.stage_chart import draw_stages
from chatglm_ja.reports.verdict import LIMITS, Outcome, judge
from chatglm_ja.storage.files import write_json

RESULTS_FILE = "results.json"
MARKDOWN_FILE = "results.md"
REPORT_FILE = "report.html"

# Titles of the curves, by stage.
TRAINING_TITLES = {
    "pretrained": "Step 5, continued pretraining",
    "sft": "Step 6, instructions",
}
# Of findings on the page, in their order.
MARKS = {Outcome.GAINED: "good", Outcome.MISSED: "bad", Outcome.COST: "quiet"}
SCREEN_WIDTH = 100  # of the verdict in a terminal


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
    """Return step 7's last screen: bits per character, the verdict, and where the report is."""
    verdict = judge(results)
    rows = list(verdict.lines())
    widths = [max(len(row[column]) for row in rows) + 2 for column in (0, 1)]
    lines = [markdown_table(*stage_table(results)), "", verdict.headline]
    previous = ""
    for language, outcome, said in rows:
        name = "" if language == previous else language
        previous = language
        lines.append(
            textwrap.fill(
                said,
                SCREEN_WIDTH,
                initial_indent=f"  {name:<{widths[0]}}{outcome:<{widths[1]}}",
                subsequent_indent=" " * (2 + sum(widths)),
                break_on_hyphens=False,
            )
        )
    return "\n".join([*lines, verdict.advice, f"report: {report}"])


def render_markdown(results: Results) -> str:
    """Return the verdict and all tables that are not folded; reads well in a terminal too."""
    return render_template(
        "results.md.jinja",
        verdict=judge(results),
        limits=LIMITS,
        pretraining=describe_pretraining(results),
        sections=[part for part in measured_sections(results) if not part[0].folded],
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
    verdict = judge(results)
    return render_template(
        "report.html.jinja",
        base=results["base"],
        model=results["model"],
        verdict=verdict,
        limits=LIMITS,
        outcomes=Outcome,
        facts={
            language: [
                (mark, str(finding).replace("->", "→"))
                for outcome, mark in MARKS.items()
                for finding in verdict.of(language, outcome)
            ]
            for language in verdict.kinds
        },
        colors=plots.language_colors(verdict.kinds),
        charts=draw_stages(results),
        pretraining=describe_pretraining(results),
        sections=measured_sections(results),
        samples=results["samples"],
        curves=[_draw_training(name, history) for name, history in results["curves"].items()],
        answers=pair_stages(results["stages"]),
        steps=steps,
        lineage=list(last["lineage"].items()),
        versions=", ".join(f"{name} {version}" for name, version in last["versions"].items()),
    )


def pair_stages(stages: Sequence[Results]) -> list[dict[str, Any]]:
    """Return the questions, each with the answers of all stages but the resized one.

    The resized model has not been trained since the base.
    """
    shown = [stage for stage in stages if stage["name"] != "resized"]
    return [
        {
            **rows[0],
            "stages": [(stage["name"], row) for stage, row in zip(shown, rows, strict=True)],
        }
        for rows in zip(*(stage["answers"] for stage in shown), strict=True)
    ]


def _draw_training(name: str, history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Draw a training over its steps; return SVG.

    `bits`      validation, in bits per character; "" for a history without them
    `losses`    training and validation loss, in nats per token
    """
    # Imports torch, which the last screen of a finished step does not need.
    from chatglm_ja.training.progress import draw_languages, draw_losses

    drawn = {}
    for key, draw, unit in (
        ("bits", draw_languages, "bits per character"),
        ("losses", draw_losses, "nats per token"),
    ):
        figure, axes = plots.make_figure(5, 3)
        draw(axes, history)
        axes.set(title=name, xlabel="optimizer steps", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
        drawn[key] = plots.to_svg(figure) if axes.lines else ""
    return drawn
