"""Losses on the validation set while training: exact means per token, by language and by source.

Step 4 numbers the sources; its manifest names them LANGUAGE/NAME, where the language may also be a
kind of conversations, such as code. Rows are scored packed: the loss of each token counts for the
source of its document or conversation, so one pass over the rows gives all figures. They depend
neither on the batch size nor on the number of processes nor, with the document mask, on the
packing.

Fine-tuning reports the sources in a table. The losses before training show how hard each source is
for the model; those after it show what the model learned from each:

    source              language   examples    tokens  loss before    after
    ja/dolly                  ja     15,000  2,100,000       3.1012   1.8023
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatglm_ja.data.dataset import SourceCount, source_titles, title_language, unpack_rows
from chatglm_ja.messages import IGNORE_INDEX

# Names in the Trainer's log; a language or source stands between prefix and suffix.
ALL_LOSS = "validation_loss"
LANGUAGE, SOURCE = "eval_", "source_"
LOSS, TOKENS, BITS = "_loss", "_tokens", "_bits_per_char"
SOURCES_FILE = "sources.json"
History = Sequence[Mapping[str, Any]]  # the Trainer's log


@dataclass(frozen=True)
class Validation:
    """Rows to score, the titles of their sources by number, and the characters of each language.

    Of conversations, only the answers are scored and counted. The token that ends an answer is
    scored, but has no characters.
    """

    rows: Any
    titles: Sequence[str]
    characters: Mapping[str, int]

    @classmethod
    def prepare(cls, rows: Any, data: Path, name: str, tokenizer: Any) -> "Validation":
        """Read the titles of the sources of step 4's data set `name`, and count characters."""
        titles = source_titles(data, name)
        characters: Counter[str] = Counter()
        # Special tokens have no text.
        if "language" in rows.column_names:
            for row in rows:
                characters[row["language"]] += len(tokenizer.decode(row["input_ids"]))
        else:
            for row in unpack_rows(rows):
                language = title_language(titles[row["sources"][0]])
                for is_answer, answer in groupby(row["labels"], key=IGNORE_INDEX.__ne__):
                    if is_answer:
                        # Without the space that a chat format has around an answer.
                        characters[language] += len(tokenizer.decode(list(answer)).strip())
        return cls(rows, titles, characters)

    def metrics(self, nats: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
        """Return entries for the Trainer's log: mean losses of all, each language and each source.

        `nats` and `tokens` have for each source the sum of the losses and the number of trained
        tokens. Languages get bits per character as well, if their characters are known.
        """
        languages: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
        sources: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
        for title, *pair in zip(self.titles, nats, tokens, strict=True):
            if pair[1]:
                languages[title_language(title)] += pair
                sources[title] += pair  # sources with the same title count as one
        metrics = {}
        for language, (loss, count) in languages.items():
            metrics[f"{LANGUAGE}{language}{LOSS}"] = float(loss / count)
            if language in self.characters:
                bits = loss / math.log(2) / self.characters[language]
                metrics[f"{LANGUAGE}{language}{BITS}"] = float(bits)
        for title, (loss, count) in sources.items():
            metrics[f"{SOURCE}{title}{LOSS}"] = float(loss / count)
            metrics[f"{SOURCE}{title}{TOKENS}"] = float(count)
        if sources:
            metrics[ALL_LOSS] = sum(nats) / sum(tokens)
        return metrics


def language_losses(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation losses in an entry of the Trainer's log, by language."""
    return _by_language(logs, LOSS)


def language_bits(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation bits per character in an entry of the Trainer's log, by language."""
    return _by_language(logs, BITS)


def _by_language(logs: Mapping[str, Any], suffix: str) -> dict[str, float]:
    return {
        name.removeprefix(LANGUAGE).removesuffix(suffix): value
        for name, value in logs.items()
        if name.startswith(LANGUAGE) and name.endswith(suffix)
    }


def token_sources(rows: Sequence[Mapping[str, Any]], width: int) -> torch.Tensor:
    """Return the source number of every token, int64 [rows, width]; 0 for padding."""
    sources = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        numbers = np.repeat(row["sources"], row["lengths"])
        sources[index, : len(numbers)] = numbers
    return torch.from_numpy(sources)


def has_sources(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of the Trainer's log has losses by source."""
    return any(name.startswith(SOURCE) for name in entry)


def losses_by_source(sources: Sequence[SourceCount], history: History) -> list[dict[str, Any]]:
    """Return each source's counts and its validation losses before and after training.

    A loss is None if it was not scored: no conversation of the source is kept for validation, or
    the run began without evaluations.
    """
    entries = [entry for entry in history if has_sources(entry)]
    before = next((entry for entry in entries if entry["step"] == 0), {})
    after = next((entry for entry in reversed(entries) if entry["step"] > 0), {})
    table = []
    for source in sources:
        name = SOURCE + source.source
        tokens = (before or after).get(name + TOKENS)
        losses = {"loss_before": before.get(name + LOSS), "loss": after.get(name + LOSS)}
        table.append(asdict(source) | {"scored_tokens": tokens} | losses)
    return table


def describe_losses(sources: Sequence[SourceCount], history: History) -> list[str]:
    """Return the lines of the table; before training without its last column."""
    cells = [("source", "language", "examples", "tokens", "loss before", "after")]
    for row in losses_by_source(sources, history):
        losses = (row["loss_before"], row["loss"])
        before, after = ("-" if loss is None else f"{loss:.4f}" for loss in losses)
        counts = (f"{row['examples']:,}", f"{row['tokens']:,}")
        cells.append((row["source"], row["language"], *counts, before, after))
    width = max(len(source) for source, *_ in cells)
    lines = [
        f"{source:<{width}}  {language:>8}{examples:>10}{tokens:>13}{before:>13}{after:>9}"
        for source, language, examples, tokens, before, after in cells
    ]
    is_trained = any(has_sources(entry) and entry["step"] > 0 for entry in history)
    return lines if is_trained else [line[:-9] for line in lines]
