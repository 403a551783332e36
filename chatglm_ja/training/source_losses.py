"""Validation losses of the sources of conversations, before and after fine-tuning.

The losses before training show how hard each source is for the model, as a table of the article
does; those after it show what the model learned from each:

    source              language   examples    tokens  loss before    after
    ja/dolly                  ja     15,000  2,100,000       3.1012   1.8023
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatglm_ja.data.dataset import SourceCount
from chatglm_ja.storage.files import write_json
from chatglm_ja.training.validation import LOSS, SOURCE, TOKENS

SOURCES_FILE = "sources.json"
History = Sequence[Mapping[str, Any]]  # the Trainer's log


def has_sources(entry: Iterable[str]) -> bool:
    """Return whether an entry of the Trainer's log has losses by source."""
    return any(name.startswith(SOURCE) for name in entry)


def losses_by_source(sources: Sequence[SourceCount], history: History) -> list[dict[str, Any]]:
    """Return each source's counts and its validation losses before and after training.

    A loss is None if it was not scored: no conversation of the source is kept for validation, or
    the run began without evaluations.
    """
    before, after = _find_scores(history)
    table = []
    for source in sources:
        name = SOURCE + source.source
        tokens = (before or after).get(name + TOKENS)
        losses = {"loss_before": before.get(name + LOSS), "loss": after.get(name + LOSS)}
        table.append(asdict(source) | {"scored_tokens": tokens} | losses)
    return table


def _find_scores(history: History) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the entries with losses by source before and after training; {} if there is none."""
    entries = [entry for entry in history if has_sources(entry)]
    before = [entry for entry in entries if entry["step"] == 0]
    after = [entry for entry in entries if entry["step"] > 0]
    return (before or [{}])[0], (after or [{}])[-1]


def describe_losses(sources: Sequence[SourceCount], history: History) -> list[str]:
    """Return the lines of the table; before training without its last column."""
    is_trained = bool(_find_scores(history)[1])
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
    """Write `losses_by_source` to `folder`/sources.json."""
    write_json(folder / SOURCES_FILE, losses_by_source(sources, history))
