"""What a merge did to each language, measured on held-out lines.

The promise of a policy (vocabulary.GUARANTEES) is checked here on every run: a line that holds none
of the policy's characters has to keep its ids.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatglm_ja.data import corpus
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary.policies import admits

EXAMPLES = 5  # differing lines that are kept to be shown


@dataclass
class Segmentation:
    """How two tokenizers cut the same lines."""

    lines: int = 0
    identical: int = 0
    covered: int = 0  # lines that the policy's guarantee covers
    characters: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    new_tokens: int = 0  # of the tokens after: those that are new pieces
    used: set[int] = field(default_factory=set)  # ids of the new pieces among them
    broken: list[str] = field(default_factory=list)  # covered lines that changed all the same
    changed: list[str] = field(default_factory=list)  # the first lines that changed
    rust_differs: list[str] = field(default_factory=list)  # lines with other ids in `tokenizers`

    def row(self) -> dict[str, float]:
        characters = max(self.characters, 1)
        return {
            "lines": self.lines,
            "identical_lines": self.identical,
            "identical_share": self.identical / max(self.lines, 1),
            "covered_lines": self.covered,
            "tokens_per_char_before": self.tokens_before / characters,
            "tokens_per_char_after": self.tokens_after / characters,
            "new_token_share": self.new_tokens / max(self.tokens_after, 1),
        }


def compare_segmentation(
    before: Any,
    after: Any,
    texts: Iterable[str],
    policy: str,
    rust: Callable[[Sequence[str]], list[list[int]]] | None = None,
) -> Segmentation:
    """Encode every line of the texts with two sentencepiece processors.

    `after` keeps the ids of `before` and adds new ones behind them. `rust`, if given, encodes
    lines with the `tokenizers` form of `after`.
    """
    first_new_id = before.get_piece_size()
    result = Segmentation()
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        encoded = after.encode(lines)
        for line, old, new in zip(lines, before.encode(lines), encoded, strict=True):
            covered = not admits(policy, line)
            result.lines += 1
            result.covered += covered
            result.identical += old == new
            if old != new:
                if len(result.changed) < EXAMPLES:
                    result.changed.append(line)
                if covered:
                    result.broken.append(line)
            added = [index for index in new if index >= first_new_id]
            result.used.update(added)
            result.new_tokens += len(added)
            result.characters += len(line)
            result.tokens_before += len(old)
            result.tokens_after += len(new)
        if rust is not None:
            pairs = zip(lines, encoded, rust(lines), strict=True)
            result.rust_differs += [line for line, ids, other in pairs if ids != other]
    return result


def sample_sentences(
    before: Any, after: Any, texts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """A sentence of every language as both cut it; `new` tells which pieces after are new ones."""
    first_new_id = before.get_piece_size()
    shown = []
    for language, documents in texts.items():
        text = corpus.sample_sentence(documents)
        shown.append(
            {
                "language": language,
                "text": text,
                "before": before.encode(text, out_type=str),
                "after": after.encode(text, out_type=str),
                "new": [index >= first_new_id for index in after.encode(text)],
            }
        )
    return shown


def segmentation_table(
    rows: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table of `Segmentation.row()` by language."""
    head = ["language", "lines", "segmented as before", "tokens/char before", "tokens/char after"]
    body = []
    for language, row in rows.items():
        numbers = (row["tokens_per_char_before"], row["tokens_per_char_after"])
        share = f"{100 * row['identical_share']:.2f}%"
        body.append([language, f"{row['lines']:,}", share, *(f"{n:.3f}" for n in numbers)])
    return head, body


def check_guarantee(languages: Mapping[str, Segmentation], policy: str) -> None:
    """Raise DataError when a line changed that the policy's guarantee covers, or when the two
    forms of the tokenizer disagree on a line (under `all`, unspellable pieces make them)."""
    for language, result in languages.items():
        if not result.lines:
            raise DataError(f"--check-sources hold no {language} text to compare on")
        if result.broken:
            raise DataError(
                f"{len(result.broken)} {language} lines that the policy {policy} must leave as "
                f"they are would change, first {result.broken[0]!r}: nothing was written"
            )
        if result.rust_differs and policy != "all":
            raise DataError(
                f"tokenizer.json would give other ids than tokenizer.model for "
                f"{len(result.rust_differs)} {language} lines, first {result.rust_differs[0]!r}: "
                "nothing was written"
            )
