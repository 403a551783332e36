"""Step 2: choosing learned pieces, merging them into the base, and comparing the segmentation.

learned ─┬─ in the base already
         ├─ outside the policy      would change how Chinese or English is segmented
         ├─ unspellable             a character has no piece: `tokenizers` spells it in bytes
         ├─ unreachable             the base's merges always take its parts first
         ├─ past --max-new-pieces   used less often than the pieces that are added
         └─ added                   every one of them is produced by some text

Step 2 checks the guarantee of its policy on every run: a held-out line without the policy's
characters keeps its ids. So do the special tokens, and their names if a text spells them.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatglm_ja.bases.interface import ModelTokenizer, Vocabulary
from chatglm_ja.data import corpus
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary.policies import LEAST_SHARE, OTHER_LANGUAGE, Policy

EXAMPLES = 5  # changed lines to show in the report


@dataclass
class MergedVocabulary:
    """A merged vocabulary and what happened to every learned piece.

    `dropped` lists pieces by reason. A policy that keeps unreachable pieces adds the unspellable
    and unreachable ones all the same.
    """

    vocabulary: Vocabulary
    added: list[str]
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return the numbers of pieces: of the base, added, by reason dropped, in all."""
        old = self.vocabulary.size - len(self.added)
        return {
            "base_pieces": old - len(self.vocabulary.special_tokens),
            "added": len(self.added),
            **{reason: len(pieces) for reason, pieces in self.dropped.items()},
            "vocabulary": self.vocabulary.size,
        }


def merge_pieces(
    base: Vocabulary,
    learned: Sequence[str],
    policy: Policy,
    *,
    max_new_pieces: int | None = None,
    ranking_texts: Iterable[str] = (),
) -> MergedVocabulary:
    """Append the learned pieces that the policy admits to the base.

    Pieces that no text produces are left out, unless the policy keeps them. With `max_new_pieces`,
    those used most on `ranking_texts` are added; see `count_uses`. Raises DataError if these texts
    use no new piece.
    """
    new = [piece for piece in learned if piece not in base]
    chosen = [piece for piece in new if policy.admits(base.content_of(piece))]
    # Every longer piece is merged from single characters.
    single = {piece for piece in [*base.pieces, *chosen] if piece and len(piece) == 1}
    unspellable = [piece for piece in chosen if not single.issuperset(piece)]
    if not policy.keeps_unreachable:
        chosen = _without(chosen, unspellable)
    unreachable = _unreachable(base, chosen)
    if not policy.keeps_unreachable:
        # Once is enough: a piece that is never produced is not a part of another either.
        chosen = _without(chosen, unreachable)
    dropped = {
        "already_known": [piece for piece in learned if piece in base],
        "outside_policy": [piece for piece in new if not policy.admits(base.content_of(piece))],
        "unspellable": unspellable,
        "unreachable": unreachable,
    }
    if max_new_pieces is not None and len(chosen) > max_new_pieces:
        uses = count_uses(base, chosen, ranking_texts)
        if not any(uses.values()):
            raise DataError(
                "--ranking-sources hold no text that any new piece occurs in: give other texts "
                "or leave --max-new-pieces out"
            )
        # A piece is used at least as often as the longer ones made from it, so that cutting the
        # list leaves only reachable pieces.
        ranked = sorted(chosen, key=lambda piece: (-uses[piece], len(piece)))
        past = set(ranked[max_new_pieces:])
        dropped["past_max_new_pieces"] = [piece for piece in chosen if piece in past]
        chosen = _without(chosen, past)
        if policy.keeps_unreachable:  # the two lists name pieces that are added all the same
            for reason in ("unspellable", "unreachable"):
                dropped[reason] = _without(dropped[reason], past)
    return MergedVocabulary(base.extend(chosen), chosen, dropped)


def check_added(merged: MergedVocabulary, policy: Policy, *, is_chosen: bool) -> None:
    """Raise DataError if no piece was added, or hardly any by a policy that nobody has chosen."""
    sizes = {reason: len(pieces) for reason, pieces in merged.dropped.items()}
    new = sum(sizes.values()) - sizes["already_known"] + len(merged.added)
    admitted = new - sizes["outside_policy"]
    if admitted < LEAST_SHARE * new and not is_chosen:
        raise DataError(
            f"the policy {policy} admits only {admitted:,} of {new:,} new pieces: "
            f"{OTHER_LANGUAGE}; to add only these, pass --policy {policy}"
        )
    if not merged.added:
        raise DataError(
            f"none of the pieces is new to the base under the policy {policy}: give the output of "
            f"step1_train_tokenizer.py; {OTHER_LANGUAGE}"
        )


def _without(pieces: list[str], excluded: Iterable[str]) -> list[str]:
    excluded = set(excluded)
    return [piece for piece in pieces if piece not in excluded]


def _unreachable(base: Vocabulary, pieces: list[str]) -> list[str]:
    """Return the pieces that no text is segmented into once they are added to the base.

    Where a piece appears in a text, no merge crossed its borders, so the merges inside it were
    those of the piece alone: it is reachable if and only if it is segmented as itself.
    """
    segmented = base.extend(pieces).segment(pieces)
    return [piece for piece, parts in zip(pieces, segmented, strict=True) if parts != [piece]]


def count_uses(base: Vocabulary, pieces: list[str], texts: Iterable[str]) -> dict[str, int]:
    """Count the merges into each new piece that the merged tokenizer makes on these texts.

    That is how often the piece is a token, or a part of a longer token. Each merge makes the texts
    one token shorter.
    """
    merged = base.extend(pieces)
    tokens: Counter[int] = Counter()
    for ids in merged.encode(texts):
        tokens.update(ids)
    by_piece = {merged.pieces[index]: count for index, count in tokens.items()}
    uses = {piece: by_piece.get(piece, 0) for piece in pieces}
    for piece in sorted(pieces, key=len, reverse=True):  # longer pieces first, then their parts
        for part in _parts(piece, merged):
            if part in uses:
                uses[part] += uses[piece]
    return uses


def _parts(piece: str, vocabulary: Vocabulary) -> list[str]:
    """Return the two pieces whose merge makes a reachable piece; none for a single character."""
    symbols = list(piece)
    while len(symbols) > 2:
        ranks = [vocabulary.merge_rank(a, b) for a, b in itertools.pairwise(symbols)]
        at = ranks.index(min(ranks))
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    return symbols if len(piece) > 1 else []


@dataclass
class Segmentation:
    """The comparison of two tokenizers on lines of one language.

    identical      lines with the same ids before and after
    covered        lines that the policy's guarantee covers
    new_tokens     tokens after that are new pieces; `used` are their ids
    broken         covered lines whose ids changed
    lossy          lines that decoded to themselves before, and no longer do
    changed        the first lines whose ids changed
    rust_differs   lines whose ids differ in the `tokenizers` form of the tokenizer after, if it is
                   another than the one compared
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
    lossy: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    rust_differs: list[str] | None = None

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
    before: ModelTokenizer,
    after: ModelTokenizer,
    texts: Iterable[str],
    policy: Policy,
    *,
    content_of: Callable[[str], str | bytes] = str,
    rust: Callable[[Sequence[str]], list[list[int]]] | None = None,
) -> Segmentation:
    """Tokenize every line of the texts with two tokenizers and compare the ids.

    `after` has the ids of `before`, then new ones. `content_of` returns a line as the policy reads
    it. `rust`, if given, tokenizes lines with the `tokenizers` form of `after`.
    """
    new_id = before.size
    result = Segmentation(rust_differs=None if rust is None else [])
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        encoded = [after.encode(line) for line in lines]
        for line, new in zip(lines, encoded, strict=True):
            old = before.encode(line)
            covered = not policy.admits(content_of(line))
            new_tokens = [index for index in new if index >= new_id]
            result.lines += 1
            result.covered += covered
            result.identical += old == new
            result.characters += len(line)
            result.tokens_before += len(old)
            result.tokens_after += len(new)
            result.new_tokens += len(new_tokens)
            result.used.update(new_tokens)
            if old == new:
                continue
            if covered:
                result.broken.append(line)
            if after.decode(new) != line == before.decode(old):
                result.lossy.append(line)
            if len(result.changed) < EXAMPLES:
                result.changed.append(line)
        if rust is not None and result.rust_differs is not None:
            pairs = zip(lines, encoded, rust(lines), strict=True)
            result.rust_differs += [line for line, ids, other in pairs if ids != other]
    return result


def spell_both(before: ModelTokenizer, after: ModelTokenizer, text: str) -> dict[str, list[Any]]:
    """Return the pieces of a text as both tokenizers segment it, `before` and `after`.

    `new` marks which pieces of `after` are new ones.
    """
    return {
        "before": before.spell(text),
        "after": after.spell(text),
        "new": [index >= before.size for index in after.encode(text)],
    }


def sample_sentences(
    before: ModelTokenizer, after: ModelTokenizer, texts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Return a sentence of every language, as `spell_both` segments it."""
    samples = []
    for language, documents in texts.items():
        text = corpus.sample_sentence(documents)
        samples.append({"language": language, "text": text, **spell_both(before, after, text)})
    return samples


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
        if result.lossy:
            raise DataError(
                f"{len(result.lossy)} {language} lines would not decode to themselves any more, "
                f"first {result.lossy[0]!r}: nothing was written"
            )
        if result.rust_differs and not policy.keeps_unreachable:
            raise DataError(
                f"tokenizer.json would give other ids than tokenizer.model for "
                f"{len(result.rust_differs)} {language} lines, first {result.rust_differs[0]!r}: "
                "nothing was written"
            )


def check_special_tokens(names: Segmentation) -> None:
    """Raise DataError if a text that spells a special token has other ids than before.

    `names` is the comparison of their names; those that the policy admits may change.
    """
    if names.broken:
        raise DataError(
            f"texts that spell {len(names.broken)} special tokens of the base would change, first "
            f"{names.broken[0]!r}: nothing was written"
        )
