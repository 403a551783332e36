"""How two tokenizers segment the same held-out lines, by language.

Step 2 checks the guarantee of its policy here on every run: a line without the policy's characters
keeps its ids.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatglm_ja.chatglm3.chat_format import first_new_id
from chatglm_ja.data import corpus
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary.policies import Policy

EXAMPLES = 5  # changed lines to show in the report


@dataclass
class Segmentation:
    """The comparison of two tokenizers on lines of one language.

    identical      lines with the same ids before and after
    covered        lines that the policy's guarantee covers
    new_tokens     tokens after that are new pieces; `used` are their ids
    broken         covered lines whose ids changed
    changed        the first lines whose ids changed
    rust_differs   lines whose ids differ in the `tokenizers` form of the tokenizer after
    """

    lines: int = 0
    identical: int = 0
    covered: int = 0
    characters: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    new_tokens: int = 0
    used: set[int] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    rust_differs: list[str] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Return the counts and rates for a report."""
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
    policy: Policy,
    rust: Callable[[Sequence[str]], list[list[int]]] | None = None,
) -> Segmentation:
    """Tokenize every line of the texts with two sentencepiece processors and compare the ids.

    `after` has the ids of `before`, then new ones. `rust`, if given, tokenizes lines with the
    `tokenizers` form of `after`.
    """
    new_id = first_new_id(after)
    result = Segmentation()
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        encoded = after.encode(lines)
        for line, old, new in zip(lines, before.encode(lines), encoded, strict=True):
            covered = not policy.admits(line)
            result.lines += 1
            result.covered += covered
            result.identical += old == new
            if old != new:
                if len(result.changed) < EXAMPLES:
                    result.changed.append(line)
                if covered:
                    result.broken.append(line)
            new_tokens = [index for index in new if index >= new_id]
            result.used.update(new_tokens)
            result.new_tokens += len(new_tokens)
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
    """Return a sentence of every language as both segment it.

    `new` marks which pieces of `after` are new ones.
    """
    new_id = first_new_id(after)
    samples = []
    for language, documents in texts.items():
        text = corpus.sample_sentence(documents)
        samples.append(
            {
                "language": language,
                "text": text,
                "before": before.encode(text, out_type=str),
                "after": after.encode(text, out_type=str),
                "new": [index >= new_id for index in after.encode(text)],
            }
        )
    return samples


def segmentation_table(
    rows: Mapping[str, Mapping[str, float]],
) -> tuple[list[str], list[list[str]]]:
    """Return the head and rows of a table of `Segmentation.row()` by language."""
    head = ["language", "lines", "segmented as before", "tokens/char before", "tokens/char after"]
    body = []
    for language, row in rows.items():
        numbers = (row["tokens_per_char_before"], row["tokens_per_char_after"])
        share = f"{100 * row['identical_share']:.2f}%"
        body.append([language, f"{row['lines']:,}", share, *(f"{n:.3f}" for n in numbers)])
    return head, body


def check_guarantee(languages: Mapping[str, Segmentation], policy: Policy) -> None:
    """Raise DataError if a line changed that the policy's guarantee covers, or if the two forms of
    the tokenizer disagree on a line, as they do on unspellable pieces that a policy keeps.
    """
    for language, result in languages.items():
        if not result.lines:
            raise DataError(f"--check-sources hold no {language} text to compare on")
        if result.broken:
            raise DataError(
                f"{len(result.broken)} {language} lines that the policy {policy} must not change "
                f"would change, first {result.broken[0]!r}: nothing was written"
            )
        if result.rust_differs and not policy.keeps_unreachable:
            raise DataError(
                f"tokenizer.json would give other ids than tokenizer.model for "
                f"{len(result.rust_differs)} {language} lines, first {result.rust_differs[0]!r}: "
                "nothing was written"
            )
