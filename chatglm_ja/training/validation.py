"""Losses on the validation set while training: exact means per token, by language and by source.

Step 4 numbers the sources; its manifest names them LANGUAGE/NAME, where the language may also be a
kind of conversations, such as code. Rows are scored packed: the loss of each token counts for the
source of its document or conversation, so one pass over the rows gives all figures. They depend
neither on the batch size nor on the number of processes nor, with the document mask, on the
packing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatglm_ja.data.dataset import source_titles, title_language

# Names in the Trainer's log; a language or source stands between prefix and suffix.
ALL_LOSS = "validation_loss"
LANGUAGE, SOURCE = "eval_", "source_"
LOSS, TOKENS, BITS = "_loss", "_tokens", "_bits_per_char"


@dataclass(frozen=True)
class Validation:
    """Rows to score, the titles of their sources by number, and the characters of each language.

    Conversations have no number of characters, as only their answers are scored.
    """

    rows: Any
    titles: Sequence[str]
    characters: Mapping[str, int]

    @classmethod
    def prepare(cls, rows: Any, data: Path, name: str, tokenizer: Any) -> "Validation":
        """Read the titles of the sources of step 4's data set `name`, and count characters."""
        characters: dict[str, int] = {}
        if "language" in rows.column_names:
            for row in rows:
                text = tokenizer.decode(row["input_ids"])  # special tokens have no text
                characters[row["language"]] = characters.get(row["language"], 0) + len(text)
        return cls(rows, source_titles(data, name), characters)

    def metrics(self, nats: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
        """Return entries for the Trainer's log: mean losses of all, each language and each source.

        `nats` and `tokens` have for each source the sum of the losses and the number of trained
        tokens. Languages get bits per character as well, if their characters are known.
        """
        languages: dict[str, np.ndarray] = {}
        sources: dict[str, np.ndarray] = {}
        for title, *pair in zip(self.titles, nats, tokens, strict=True):
            if pair[1]:
                # Sources with the same title count as one.
                for group, name in ((languages, title_language(title)), (sources, title)):
                    group[name] = group.get(name, np.zeros(2)) + pair
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
    return {
        name.removeprefix(LANGUAGE).removesuffix(LOSS): value
        for name, value in logs.items()
        if name.startswith(LANGUAGE) and name.endswith(LOSS)
    }


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, validation loss) pairs of every language from the Trainer's log."""
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for language, loss in language_losses(entry).items():
            points.setdefault(language, []).append((entry["step"], loss))
    return dict(sorted(points.items()))


def token_sources(rows: Sequence[Mapping[str, Any]], width: int) -> torch.Tensor:
    """Return the source number of every token, int64 [rows, width]; 0 for padding."""
    sources = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        numbers = np.repeat(row["sources"], row["lengths"])
        sources[index, : len(numbers)] = numbers
    return torch.from_numpy(sources)
