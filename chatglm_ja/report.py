"""Step 7's results as a table for the terminal and as one self-contained HTML page.

results = {
    "stages": [{"name", "languages": {language: {"bits_per_char", "tokens_per_char", ...}},
                "answers": [{"language", "question", "text", "tokens", "stopped"}]}],
    "held_out_answers": [{"kind", "way", "questions", "in_language", "ended"}],
    "segmentation": {language: Segmentation.row()},
    "sample": {"text", "before": [piece], "after": [piece]},
    "curves": {name: history of the Trainer},
    "lineage": {role: fingerprint}, "versions": {package: version},
}
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from chatglm_ja import page, segmentation
from chatglm_ja.validation import curves

Results = Mapping[str, Any]

HELD_OUT = "Answers of the fine-tuned model to held-out questions"


def stage_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows: bits and tokens per character of every stage and language."""
    stages = results["stages"]
    languages = list(stages[0]["languages"])
    head = ["stage", *(f"{language} bits/char" for language in languages)]
    head += [f"{language} tokens/char" for language in languages]
    rows = []
    for stage in stages:
        scores = [stage["languages"][language] for language in languages]
        row = [stage["name"]]
        for language, score in zip(languages, scores, strict=True):
            base = stages[0]["languages"][language]["bits_per_char"]
            change = 100 * (score["bits_per_char"] / base - 1)
            suffix = "" if stage is stages[0] else f" ({change:+.1f}%)"
            row.append(f"{score['bits_per_char']:.3f}{suffix}")
        rows.append([*row, *(f"{score['tokens_per_char']:.3f}" for score in scores)])
    return head, rows


def held_out_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows: how the fine-tuned model answers the held-out questions of each kind."""
    head = ["kind", "way", "questions", "in the language", "ended by itself"]
    rows = []
    for row in results["held_out_answers"]:
        language = "" if row["in_language"] is None else f"{row['in_language']:.0%}"
        ended = f"{row['ended']:.0%}"
        rows.append([row["kind"], row["way"], str(row["questions"]), language, ended])
    return head, rows


def learning(results: Results) -> str:
    """What continued pretraining did to every language, in a sentence."""
    stages = {stage["name"]: stage["languages"] for stage in results["stages"]}
    changes = []
    for language, before in stages["resized"].items():
        old, new = before["bits_per_char"], stages["pretrained"][language]["bits_per_char"]
        changes.append(f"{language} {old:.3f} -> {new:.3f} ({100 * (new / old - 1):+.1f}%)")
    return "Continued pretraining, bits per character: " + ", ".join(changes)


def markdown(results: Results) -> str:
    """The tables, aligned so that they read well in a terminal too."""
    return "\n".join(
        [
            "Bits per character (change against the base) and tokens per character, held-out text",
            "",
            *_markdown_table(*stage_table(results)),
            "",
            learning(results),
            "",
            "Lines that the merged tokenizer segments as the base does, held-out text",
            "",
            *_markdown_table(*segmentation.table(results["segmentation"])),
            "",
            *_held_out_lines(results),
        ]
    )


def _held_out_lines(results: Results) -> list[str]:
    if not results["held_out_answers"]:
        return []
    return [HELD_OUT, "", *_markdown_table(*held_out_table(results)), ""]


def _markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * (widths[0]), *("-" * (width - 1) + ":" for width in widths[1:])], *rows]
    return [
        "| " + " | ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ) + " |"
        for line in lines
    ]  # fmt: skip


def html_page(results: Results) -> str:
    """The whole report as one HTML document."""
    sample = results["sample"]
    sections = [
        "<h1>ChatGLM3 learns Japanese: what it gained, what it cost</h1>",
        "<h2>Stages</h2>",
        "<p>Bits per character on held-out text: lower is better, and comparable between "
        "vocabularies. In brackets: the change against the base model.</p>",
        page.table(*stage_table(results)),
        f"<p>{html.escape(learning(results))}</p>",
        "<h2>Vocabulary</h2>",
        page.table(*segmentation.table(results["segmentation"])),
        f"<p>{html.escape(sample['text'])}</p>",
        f"<p>Before: {len(sample['before'])} tokens</p>",
        page.pieces(sample["before"]),
        f"<p>After: {len(sample['after'])} tokens</p>",
        page.pieces(sample["after"]),
        "<h2>Loss</h2>",
        *(_curve(name, log) for name, log in results["curves"].items()),
        "<h2>Answers</h2>",
        *(
            [f"<p>{HELD_OUT}</p>", page.table(*held_out_table(results))]
            if results["held_out_answers"]
            else []
        ),
        "<p>Greedy. <small>■ ended by itself, … ran into the limit</small></p>",
        *_answers(results["stages"]),
        "<h2>Made from</h2>",
        page.table(["input", "fingerprint"], [[k, v[:12]] for k, v in results["lineage"].items()]),
        "<p><small>"
        + html.escape(", ".join(f"{name} {v}" for name, v in results["versions"].items()))
        + "</small></p>",
    ]
    return page.document("ChatGLM3 Japanese: report", sections)


def _answers(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    blocks = []
    for index, asked in enumerate(stages[0]["answers"]):
        cells = []
        for stage in stages:
            given = stage["answers"][index]
            end = "■" if given["stopped"] else "…"
            cells.append(
                f"<div><small>{html.escape(stage['name'])}</small>"
                f"<p>{html.escape(given['text'])} {end}</p></div>"
            )
        question = html.escape(f"{asked['language']}: {asked['question']}")
        blocks.append(
            f'<p class="question">{question}</p><div class="answers">{"".join(cells)}</div>'
        )
    return blocks


def _curve(name: str, history: Sequence[Mapping[str, Any]]) -> str:
    """Training and validation loss over the steps, as inline SVG."""
    figure, axes = page.figure(7, 3.2)
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    axes.plot(*zip(*points, strict=True), label="training", color="#1d2330")
    for language, curve in curves(history).items():
        label = f"validation {language}"
        axes.plot(*zip(*curve, strict=True), "o--", label=label, markersize=4, linewidth=1)
    axes.set(title=name, xlabel="optimizer steps", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return page.svg(figure)
