"""Losses on the validation set while training: exact means per token, by language and by source.

Step 4 numbers the sources of texts and of conversations; its manifest names them LANGUAGE/NAME,
where the language may also be a kind of conversations as code. Rows are scored as they are packed:
every token's loss counts for the source that its document or conversation is of, so one pass gives
all figures, and they depend neither on the batch size nor on the number of processes; and, unless
--no-document-mask lets tokens see what is packed before them, not on the packing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatglm_ja.data.dataset import source_titles, title_language

# Names in the Trainer's log; that of a language or source stands between prefix and suffix.
ALL_LOSS = "validation_loss"
LANGUAGE, SOURCE = "eval_", "source_"
LOSS, TOKENS, BITS = "_loss", "_tokens", "_bits_per_char"


@dataclass(frozen=True)
class Validation:
    """Rows to score, the titles of their sources by number, and, for texts, the characters of each
    language: of conversations only the answers are scored, which have none of their own."""

    rows: Any
    titles: Sequence[str]
    characters: Mapping[str, int]

    @classmethod
    def of(cls, rows: Any, data: Path, name: str, encoder: Any) -> "Validation":
        """The validation set `name` (pretrain or sft) of step 4's folder."""
        characters: dict[str, int] = {}
        if "language" in rows.column_names:
            # Special tokens have no text.
            for row in rows:
                text = encoder.decode(row["input_ids"])
                characters[row["language"]] = characters.get(row["language"], 0) + len(text)
        return cls(rows, source_titles(data, name), characters)

    def metrics(self, nats: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
        """Entries for the Trainer's log, from the sum of the losses and the trained tokens of every
        source: the mean of all, of every language with bits per character where they are known,
        and of every source."""
        languages: dict[str, np.ndarray] = {}
        sources: dict[str, np.ndarray] = {}
        for title, *pair in zip(self.titles, nats, tokens, strict=True):
            if pair[1]:
                # Sources of one name count as one.
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
    """The validation losses in an entry of the Trainer's log, by language."""
    return {
        name.removeprefix(LANGUAGE).removesuffix(LOSS): value
        for name, value in logs.items()
        if name.startswith(LANGUAGE) and name.endswith(LOSS)
    }


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The validation losses of every language over the steps, from the Trainer's log."""
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for language, loss in language_losses(entry).items():
            points.setdefault(language, []).append((entry["step"], loss))
    return dict(sorted(points.items()))


def token_sources(rows: Sequence[Mapping[str, Any]], width: int) -> torch.Tensor:
    """The source of every token of some rows, int64 [rows, width]; 0 for padding."""
    sources = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        of_row = np.repeat(row["sources"], row["lengths"])
        sources[index, : len(of_row)] = of_row
    return torch.from_numpy(sources)
