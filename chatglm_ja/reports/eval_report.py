"""Step 7's results as tables for the terminal and as one self-contained HTML page.

results = {
    "stages": [what evaluate.Evaluation.evaluate_stage returns],
    "segmentation": {language: Segmentation.row()},
    "samples": segmentation.samples(...),
    "curves": {name: history of the Trainer},
    "steps": {step: its manifest},
}
"""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatglm_ja import plots
from chatglm_ja.evaluation import multiple_choice
from chatglm_ja.inference.generation import DECODINGS
from chatglm_ja.reports import markdown, render
from chatglm_ja.training import loss_plot
from chatglm_ja.vocabulary import segmentation

Results = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]  # head and rows


def stage_table(results: Results) -> Table:
    """Bits per character of every stage and language, with the change against the base."""
    return _by_language(results, "bits_per_char", "bits/char", change=True)


def byte_table(results: Results) -> Table:
    """The same per byte."""
    return _by_language(results, "bits_per_byte", "bits/byte", change=True)


def speed_table(results: Results) -> Table:
    """Tokens per character, and characters per second of one answer alone."""
    head, rows = _by_language(results, "tokens_per_char", "tokens/char")
    more_head, more = _by_language(results, "chars_per_second", "chars/s", digits=0)
    return [*head, *more_head[1:]], [[*a, *b[1:]] for a, b in zip(rows, more, strict=True)]


def _by_language(
    results: Results, key: str, unit: str, *, digits: int = 3, change: bool = False
) -> Table:
    stages = results["stages"]
    languages = list(stages[0]["languages"])
    rows = []
    for stage in stages:
        row = [stage["name"]]
        for language in languages:
            value, base = (s["languages"][language][key] for s in (stage, stages[0]))
            suffix = f" ({100 * (value / base - 1):+.1f}%)" if change and stage != stages[0] else ""
            row.append(f"{value:,.{digits}f}{suffix}")
        rows.append(row)
    return ["stage", *(f"{language} {unit}" for language in languages)], rows


def kept_table(results: Results) -> Table:
    """How far each stage is from the base on the ids that both have."""
    rows = []
    for stage in results["stages"]:
        for language, row in stage["kept"].items():
            worst = row["largest_difference"]
            rows.append(
                [
                    stage["name"],
                    language,
                    f"{row['tokens']:,}",
                    "identical" if worst == 0 else f"{worst:.3g}",
                    f"{row['divergence_bits']:.3f}",
                ]
            )
    return ["stage", "language", "tokens", "largest difference of logits", "divergence, bits"], rows


def answering_table(results: Results) -> Table:
    """How every stage answers the questions, greedy and sampled."""
    rows = [
        [stage["name"], way, *_measures(stage["answering"][way])]
        for stage in results["stages"]
        for way in DECODINGS
    ]
    return ["stage", "way", *MEASURES], rows


def held_out_table(results: Results) -> Table:
    """How the last stage answers the held-out questions of each kind."""
    rows = [[row["kind"], row["way"], *_measures(row)] for row in results["stages"][-1]["held_out"]]
    return ["kind", "way", *MEASURES], rows


MEASURES = (
    "questions", "in the language", "ended by itself", "repeated 4-grams", "longest loop"
)  # fmt: skip


def _measures(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["questions"]),
        "" if row["in_language"] is None else f"{row['in_language']:.0%}",
        f"{row['ended']:.0%}",
        f"{row['repeated']:.0%}",
        str(row["longest_loop"]),
    ]


def choice_table(results: Results) -> Table:
    """Multiple choice: the share of right answers, in three ways to compare the choices."""
    rows = [
        [
            stage["name"],
            language,
            str(row["questions"]),
            f"{row['chance']:.0%}",
            *(_share(row[way], row["questions"]) for way in multiple_choice.METRICS),
        ]
        for stage in results["stages"]
        for language, row in stage["choices"].items()
    ]
    titles = [metric.title for metric in multiple_choice.METRICS.values()]
    return ["stage", "language", "questions", "chance", *titles], rows


def _share(share: float, count: int) -> str:
    """A share of some questions, with its standard error in percentage points."""
    return f"{share:.0%} ± {100 * math.sqrt(share * (1 - share) / count):.0f}"


def harness_table(results: Results) -> Table:
    """lm-evaluation-harness: a task and metric in a row, with its standard error."""
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


def learning(results: Results) -> str:
    """What continued pretraining did to every language, in a sentence."""
    stages = {stage["name"]: stage["languages"] for stage in results["stages"]}
    changes = []
    for language, before in stages["resized"].items():
        old, new = before["bits_per_char"], stages["pretrained"][language]["bits_per_char"]
        changes.append(f"{language} {old:.3f} -> {new:.3f} ({100 * (new / old - 1):+.1f}%)")
    changed = ", ".join(changes)
    return f"Continued pretraining, against the resized model, bits per character: {changed}"


def _held_out(results: Results) -> str:
    """The names of what was scored, in brackets."""
    sources = results["steps"].get("step7_eval", {}).get("arguments", {}).get("sources", [])
    return f" ({', '.join(source['name'] for source in sources)})" if sources else ""


def sections(results: Results) -> Iterator[tuple[str, str, Table]]:
    """Title, explanation and table of everything that was measured."""
    yield (
        "Bits per character",
        f"Held-out text{_held_out(results)}: lower is better, and comparable between vocabularies. "
        "In brackets: the change against the base. The resized model has the new pieces, and "
        "learned nothing yet.",
        stage_table(results),
    )
    yield "Bits per byte", "The same text, over its bytes in UTF-8.", byte_table(results)
    yield (
        "Tokens and speed",
        "Characters per second: of one answer alone, its tokens per second over the tokens per "
        "character of the held-out text; timed once for each size of the vocabulary, on this "
        "machine as busy as it was.",
        speed_table(results),
    )
    yield (
        "Segmentation",
        "Held-out lines that the merged tokenizer cuts as the base does.",
        segmentation.segmentation_table(results["segmentation"]),
    )
    yield (
        "Distance from the base",
        "The beginnings of held-out texts as the base's ids, read by the base and by each stage: "
        "the logits of these ids, and how far the next token's distribution is from the base's "
        "(Kullback-Leibler; what goes to new pieces counts as lost).",
        kept_table(results),
    )
    yield (
        "Answers",
        "To the questions of --prompts. Repeated 4-grams: the share of four words in a row (four "
        "characters of Japanese and Chinese) that the answer had already, mean over all. "
        "Longest loop: the most words in a stretch that says the same three times or more. In the "
        "language: of the answers whose language can be told, which that of code cannot.",
        answering_table(results),
    )
    if results["stages"][-1]["held_out"]:
        yield (
            "Answers to held-out questions",
            "Of the fine-tuned model, by the kind of the question.",
            held_out_table(results),
        )
    if results["stages"][0]["choices"]:
        yield (
            "Multiple choice",
            "The share of questions whose right choice is the likeliest, the likeliest per "
            "character, or the one that the question makes likelier by most; with standard errors.",
            choice_table(results),
        )
    if results["stages"][0]["harness"]:
        yield "lm-evaluation-harness", "With standard errors.", harness_table(results)


def render_markdown(results: Results) -> str:
    """The tables, aligned so that they read well in a terminal too."""
    lines = [learning(results), ""]
    for title, explanation, (head, rows) in sections(results):
        lines += [f"### {title}", "", explanation, "", *markdown.markdown_table(head, rows), ""]
    return "\n".join(lines)


def html_page(results: Results) -> str:
    """The whole report as one HTML document."""
    parts = [
        "<h1>A new language for ChatGLM3: what it gained, what it cost</h1>",
        f"<p>{html.escape(learning(results))}</p>",
    ]
    for title, explanation, table in sections(results):
        parts += [f"<h2>{title}</h2>", f"<p>{html.escape(explanation)}</p>", render.table(*table)]
        if title == "Segmentation":
            parts += map(_sample, results["samples"])
    parts += [
        "<h2>Loss</h2>",
        *(_curve(name, log) for name, log in results["curves"].items()),
        "<h2>The answers</h2>",
        "<p><small>■ ended by itself, … ran into the limit; longer answers scroll</small></p>",
        *_answers(results["stages"]),
        "<h2>How it was made</h2>",
        *_steps(results["steps"]),
    ]
    return render.document("ChatGLM3: report", parts)


def _sample(sample: Mapping[str, Any]) -> str:
    before, after, new = sample["before"], sample["after"], sample["new"]
    text = f'<p class="example">{html.escape(sample["text"])}</p>'
    if before == after:
        return f"{text}<p>Before and after: {len(after)} tokens</p>{render.pieces(after)}"
    return (
        f"{text}<p>Before: {len(before)} tokens</p>{render.pieces(before)}"
        f"<p>After: {len(after)} tokens, {sum(new)} of them new pieces</p>"
        f"{render.pieces(after, new)}"
    )


def _answers(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every question, and below it the answers of all stages side by side."""
    for index, asked in enumerate(stages[0]["answers"]):
        cells = []
        for stage in stages:
            cell = [f"<strong>{html.escape(stage['name'])}</strong>"]
            for way in DECODINGS:
                given = stage["answers"][index][way]
                end = "■" if given["stopped"] else "…"
                cell.append(f"<small>{way} {end}</small><p>{html.escape(given['text'])}</p>")
            cells.append(f"<div>{''.join(cell)}</div>")
        question = html.escape(f"{asked['language']}: {asked['question']}")
        yield f'<p class="question">{question}</p><div class="answers">{"".join(cells)}</div>'


def _steps(steps: Mapping[str, Any]) -> Iterator[str]:
    """Settings of every step, to be opened; then hashes and versions."""
    for step, manifest in steps.items():
        rows = [
            [name, json.dumps(value, ensure_ascii=False)]
            for name, value in manifest["arguments"].items()
        ]
        if manifest["fingerprint"]:  # step 7 has none before it is published
            rows.append(["fingerprint of the result", manifest["fingerprint"]])
        yield f"<details><summary>{html.escape(step)}</summary>"
        yield render.table(["setting", "value"], rows) + "</details>"
    last = list(steps.values())[-1]
    yield "<details><summary>SHA-256 of everything that was read</summary>"
    yield render.table(["input", "fingerprint"], [list(e) for e in last["lineage"].items()])
    yield "</details>"
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    yield f"<p><small>{html.escape(versions)}</small></p>"


def _curve(name: str, history: Sequence[Mapping[str, Any]]) -> str:
    """Training and validation loss over the steps, as inline SVG."""
    figure, axes = plots.figure(7, 3.2)
    loss_plot.draw_losses(axes, history)
    axes.set(title=name, xlabel="optimizer steps", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return plots.svg(figure)
