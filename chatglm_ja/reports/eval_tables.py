"""The tables of everything that step 7 measures, in the order of its report.

A measure that is added to evaluation/evaluate.py gets its table here: a function, and an entry of
SECTIONS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatglm_ja.reports.render import Table
from chatglm_ja.vocabulary.merging import segmentation_table

Results = Mapping[str, Any]  # see eval_report.py


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


ANSWERS = (
    "In the language: share of the answers that are in the question's language, without those to "
    "questions about code. Repeated 4-grams: share of the 4-grams of words (Japanese and Chinese: "
    "of characters) that the answer already contained, averaged over the answers. Longest loop: "
    "the most words in a stretch that repeats itself three or more times."
)
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
    """Return how every stage answers the held-out questions, by kind and decoding."""
    measured = [(row, stage["name"]) for stage in results["stages"] for row in stage["held_out"]]
    kinds = list(dict.fromkeys(row["kind"] for row, _ in measured))
    measured.sort(key=lambda pair: (kinds.index(pair[0]["kind"]), pair[0]["way"] == "greedy"))
    rows = [[f"{row['kind']}, {stage}", row["way"], *_answer_cells(row)] for row, stage in measured]
    return ["kind, stage", "decoding", *ANSWER_MEASURES], rows


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
    return _compared_table(results, lambda stage: stage["likeness"], ("kind",), show_number)


def probe_table(results: Results) -> Table:
    """Return the share of right answers, or of saved bits, in the probes of in-context learning."""
    head, rows = _compared_table(results, lambda stage: stage["probes"], ("language", "probe"))
    chances = [f"{row['chance']:.0%}" for row in results["stages"][0]["probes"]]
    return [head[0], "chance", *head[1:]], [
        [row[0], chance, *row[1:]] for row, chance in zip(rows, chances, strict=True)
    ]


def translation_table(results: Results) -> Table:
    """Return chrF by direction and number of examples."""
    return _compared_table(
        results, lambda stage: stage["translations"], ("direction", "shots"), show_number
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
        show = {"bits_per_char": show_bits, "characters": show_number}.get(name, show_share)
        head, rows = _compared_table(results, _entries("retention", {name: title}), KEYS, show)
        table += rows
    order = list(results["stages"][0]["retention"])
    return head, sorted(table, key=lambda row: order.index(row[0].partition(", ")[0]))


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
                "choice": f"{METRICS[name].title} ({row['chance']:.0%} by chance)",
                **compared,
            }
            for language, row in stage["choices"].items()
            for name, compared in row["compared"].items()
        ]

    return _compared_table(results, rows_of, ("language", "choice"))


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


def show_share(value: float) -> str:
    return f"{100 * value:.0f}"


def show_number(value: float) -> str:
    return f"{value:.1f}"


def show_bits(value: float) -> str:
    return f"{value:.2f}"


def _compared_table(
    results: Results,
    rows_of: Callable[[Results], Sequence[Mapping[str, Any]]],
    keys: Sequence[str],
    show: Callable[[float], str] = show_share,
) -> Table:
    """Return a table of measures by stage, whose rows are what paired.Baseline.compare returned.

    The values of `keys` are the first cell. The others are mean ± standard error; then the
    difference from the base, or ≈ where there is none that can be measured.
    """
    from chatglm_ja.evaluation.paired import is_measurable

    stages = results["stages"]
    rows = []
    for measured in zip(*(rows_of(stage) for stage in stages), strict=True):
        cells = [", ".join(str(measured[0][key]) for key in keys)]
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
    return [", ".join(keys), "items", *(stage["name"] for stage in stages)], rows


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


@dataclass(frozen=True)
class Section:
    """A table and what it shows; {sources} stands for the names of the held-out texts.

    `folded` is what says more of another table: only the page has it, closed. `texts` is a table
    whose cells are texts, not numbers.
    """

    title: str
    explanation: str
    make_table: Callable[[Results], Table]
    folded: bool = False
    texts: bool = False


SECTIONS = [
    Section(
        "Bits per character",
        "Held-out text{sources}: lower is better, and values are comparable between vocabularies. "
        "In brackets: the change from the base. The resized model has the new pieces but has not "
        "been trained yet.",
        stage_table,
    ),
    Section(
        "Bits per byte",
        "The same text, divided by its length in UTF-8 bytes.",
        lambda results: _language_table(results, "bits_per_byte", "bits/byte", show_change=True),
        folded=True,
    ),
    Section(
        "Distance from the base",
        "The base and each stage read the beginnings of the held-out texts, tokenized by the base. "
        "Compared are the logits of the base's ids and the distributions of the next token "
        "(Kullback-Leibler divergence; probability of new pieces counts as lost).",
        distance_table,
        folded=True,
    ),
    Section(
        "Answers",
        f"Answers to held-out questions, by the language of the answer, or code. {ANSWERS}",
        held_out_table,
    ),
    Section(
        "Answers to --prompts",
        "The same measures of the answers to the questions of the prompts file.",
        answer_table,
        folded=True,
    ),
    Section(
        "Likeness to the expected answers",
        "chrF (0 to 100) of the sampled answers to held-out questions and the answers that go with "
        f"them. {COMPARED}",
        likeness_table,
    ),
    Section(
        "Language confusion",
        "Sampled answers in percent. All lines in the language: answers of which every line of "
        "some length is in the question's language. No foreign word: of these, answers without an "
        "English word (in lower case, four letters or more, not in the question) or another "
        "script. Han outside JIS X 0208: Japanese answers with Chinese forms such as 设置; fewer "
        f"are better. {COMPARED}",
        confusion_table,
    ),
    Section(
        "Han characters outside JIS X 0208",
        "The last model's Japanese answers that hold them.",
        han_table,
        folded=True,
        texts=True,
    ),
    Section(
        "Chat retention",
        "The base's sampled answers in the languages that it knew: how many bits per character "
        "each stage needs for them (the difference from the base is how far its answers have "
        f"moved), and in percent how the stage answers the same questions itself. {COMPARED}",
        retention_table,
    ),
    Section(
        "In-context probes",
        "What a model does with a text that it has just read, which bits per character hardly "
        "shows. The right answer is in the text, so no knowledge is needed. copy and reverse: a "
        "list of words in the same or the opposite order. recall N: the value of a key, in N "
        "tokens of keys and values. labels: lines of two languages, each with an arbitrary "
        "letter. Right answers in percent. repeat: the percentage of a passage's bits that the "
        f"model saves where it reads the passage for the second time. {COMPARED}",
        probe_table,
    ),
    Section(
        "Translation",
        "chrF (0 to 100) of held-out lines, after no and after a few examples in the same text. "
        f"{COMPARED}",
        translation_table,
    ),
    Section(
        "Multiple choice",
        "Percent of the questions whose correct choice is the likeliest, the likeliest per "
        f"character, or the one whose likelihood gains most from the question. {COMPARED}",
        choice_table,
    ),
    Section(
        "llm-jp-eval",
        "Answers to the data sets of --tasks: mean over the questions ± standard error. Shots: the "
        "examples before each question.",
        task_table,
    ),
    Section("lm-evaluation-harness", "Values ± standard error.", harness_table),
    Section(
        "Segmentation",
        "Held-out lines that the merged tokenizer segments as the base's does.",
        lambda results: segmentation_table(results["segmentation"]),
    ),
    Section(
        "Tokens and speed",
        "Characters per second of a single answer: its tokens per second divided by the tokens per "
        "character of the held-out text. Timed once per vocabulary size, so other load on this "
        "machine affects it.",
        speed_table,
    ),
]


def measured_sections(results: Results) -> list[tuple[Section, str, Table]]:
    """Return the sections of what was measured, each with its explanation and table."""
    arguments = results["steps"].get("step7_eval", {}).get("arguments", {})
    names = ", ".join(source["name"] for source in arguments.get("sources", []))
    sources = f" ({names})" if names else ""
    tables = [(section, section.make_table(results)) for section in SECTIONS]
    return [
        (section, section.explanation.format(sources=sources), table)
        for section, table in tables
        if table[1]
    ]
