"""Where conversations come from: their kinds and sources, and what each costs a model.

The losses of the sources before training say how hard each is for the model, as a table of the
article does, and those after it what was learned of each:

    source              language   examples    tokens  loss before    after
    ja/dolly                  ja     15,000  2,100,000       3.1012   1.8023
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from chatglm_ja import chat
from chatglm_ja.errors import DataError
from chatglm_ja.validation import LOSS, SOURCE, TOKENS, language_of, titles

FILE = "sources.json"
COLUMNS = ("input_ids", "labels", "lengths", "sources")
History = Sequence[Mapping[str, Any]]  # the Trainer's log


@dataclass(frozen=True)
class Counted:
    """A source, and what is trained on of it: conversations, and their tokens."""

    source: str
    language: str
    examples: int
    tokens: int


def count(rows: Any, named: Sequence[str]) -> list[Counted]:
    """What packed or unpacked rows hold of every source that they hold something of.

    `named` are the titles by number; sources of one title count as one.
    """
    examples = np.zeros(len(named), dtype=np.int64)
    tokens = np.zeros(len(named), dtype=np.int64)
    for batch in rows.data.table.to_batches():
        numbers, lengths = (batch[name].flatten().to_numpy() for name in ("sources", "lengths"))
        examples += np.bincount(numbers, minlength=len(named))
        tokens += np.bincount(numbers, lengths, len(named)).astype(np.int64)
    found: dict[str, np.ndarray] = {}
    for title, *pair in zip(named, examples, tokens, strict=True):
        if pair[0]:
            found[title] = found.get(title, np.zeros(2, dtype=np.int64)) + pair
    return [Counted(title, language_of(title), *pair.tolist()) for title, pair in found.items()]


def check(rows: Any, data: Path, split: str, encoder: Any) -> None:
    """Raises DataError for the first conversation of packed rows that nothing can be learned from
    as it is: one without a trained token, with an empty answer, or whose labels are not its ids.

    Step 4 writes none; what comes from elsewhere may hold some. Says which it is of the split,
    train or validation, and of what source.
    """
    named = titles(data, "sft")
    # What an empty answer trains: the header's line break, and what ends it.
    nothing = len(chat.encode_text(encoder, "\n")) + 1
    before = 0
    for batch in rows.data.table.to_batches():
        ids, labels, lengths, sources = (batch[name].flatten().to_numpy() for name in COLUMNS)
        _check_lengths(batch, data, split, len(named))
        if not len(lengths):
            continue
        ends = np.cumsum(lengths)
        trained = labels != chat.IGNORE
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
        untrained = np.logical_or.reduceat(trained, ends - lengths) == 0
        problems = {
            "has no token that is trained": ends[untrained] - 1,
            "has an empty answer": edges[np.diff(edges)[:, 0] <= nothing, 0],
            "has labels that are not its tokens": np.flatnonzero(trained & (labels != ids)),
        }
        for problem, places in problems.items():
            if not len(places):
                continue
            number = int(np.searchsorted(ends, places[0], side="right"))
            text = encoder.decode(ids[ends[number] - lengths[number] : ends[number]].tolist())
            raise DataError(
                f"{data}: {split} conversation {before + number + 1}, from "
                f"{named[sources[number]]}, {problem}: it starts {text.strip()[:60]!r}"
            )
        before += len(lengths)


def _check_lengths(batch: Any, data: Path, split: str, named: int) -> None:
    """Whether a row's lists are of the lengths that they give each other."""
    sizes = {name: pyarrow.compute.list_value_length(batch[name]).to_numpy() for name in COLUMNS}
    lengths = batch["lengths"].flatten().to_numpy()
    numbers = batch["sources"].flatten().to_numpy()
    rows = np.repeat(np.arange(len(batch)), sizes["lengths"])
    filled = np.bincount(rows, lengths, len(batch))
    good = (sizes["input_ids"] == filled) & (sizes["labels"] == filled)
    good &= sizes["sources"] == sizes["lengths"]
    if not good.all() or (lengths <= 0).any() or (numbers >= named).any():
        raise DataError(
            f"{data}: the tokens, labels, lengths and sources of a {split} row do not belong "
            "together: prepare the data again"
        )


def are_scored(logs: Iterable[str]) -> bool:
    return any(name.startswith(SOURCE) for name in logs)


def losses(sources: Sequence[Counted], history: History) -> list[dict[str, Any]]:
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


def describe(sources: Sequence[Counted], history: History) -> list[str]:
    """The table's lines; before training its last column is left out."""
    is_trained = bool(_scored(history)[1])
    rows = losses(sources, history)
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


def write(sources: Sequence[Counted], history: History, folder: Path) -> None:
    text = json.dumps(losses(sources, history), indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
