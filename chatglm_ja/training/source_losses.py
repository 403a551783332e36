"""Where conversations come from: their kinds and sources, and what each costs a model.

The losses of the sources before training say how hard each is for the model, as a table of the
article does, and those after it what was learned of each:

    source              language   examples    tokens  loss before    after
    ja/dolly                  ja     15,000  2,100,000       3.1012   1.8023
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatglm_ja.data.dataset import SourceCount
from chatglm_ja.training.validation import LOSS, SOURCE, TOKENS

SOURCES_FILE = "sources.json"
History = Sequence[Mapping[str, Any]]  # the Trainer's log


def are_scored(logs: Iterable[str]) -> bool:
    return any(name.startswith(SOURCE) for name in logs)


def losses_by_source(sources: Sequence[SourceCount], history: History) -> list[dict[str, Any]]:
    """Every source with its validation losses before training and after, of so many tokens.

    None for what was not scored: a source of which no conversation is kept for validation, or a
    run that began without evaluations.
    """
    first, last = _scored(history)
    table = []
    for source in sources:
        name = SOURCE + source.source
        tokens = (first or last).get(name + TOKENS)
        row = {"loss_before": first.get(name + LOSS), "loss": last.get(name + LOSS)}
        table.append(asdict(source) | {"scored_tokens": tokens} | row)
    return table


def _scored(history: History) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The entries in which the sources are scored before and after training, empty where none."""
    scored = [entry for entry in history if are_scored(entry)]
    before = [entry for entry in scored if entry["step"] == 0]
    after = [entry for entry in scored if entry["step"] > 0]
    return (before or [{}])[0], (after or [{}])[-1]


def describe_losses(sources: Sequence[SourceCount], history: History) -> list[str]:
    """The table's lines; before training its last column is left out."""
    is_trained = bool(_scored(history)[1])
    rows = losses_by_source(sources, history)
    width = max(map(len, ["source", *(row["source"] for row in rows)]))
    head = f"{'source':<{width}}  language{'examples':>10}{'tokens':>13}{'loss before':>13}"
    lines = [head + (f"{'after':>9}" if is_trained else "")]
    for row in rows:
        before, after = (
            "-" if row[name] is None else f"{row[name]:.4f}" for name in ("loss_before", "loss")
        )
        line = f"{row['source']:<{width}}  {row['language']:>8}{row['examples']:>10,}"
        line += f"{row['tokens']:>13,}{before:>13}"
        lines.append(line + (f"{after:>9}" if is_trained else ""))
    return lines


def write_source_losses(sources: Sequence[SourceCount], history: History, folder: Path) -> None:
    text = json.dumps(losses_by_source(sources, history), indent=1, ensure_ascii=False)
    (folder / SOURCES_FILE).write_text(text + "\n", encoding="utf-8")
