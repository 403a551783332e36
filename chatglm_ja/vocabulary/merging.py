"""Merging learned pieces into the base's vocabulary."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chatglm_ja.chatglm3.tokenizer import (
    SPECIAL_TOKENS,
    add_special_tokens,
    encode_texts,
    make_processor,
)
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary.policies import admits


@dataclass
class MergedVocabulary:
    """A merged model (ModelProto) and what became of every Japanese piece."""

    proto: Any
    added: list[str]
    # Reason -> pieces. Under the policy `all` the unspellable and unreachable ones are added.
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {
            "base_pieces": len(self.proto.pieces) - len(self.added) - len(SPECIAL_TOKENS),
            "added": len(self.added),
            **{reason: len(pieces) for reason, pieces in self.dropped.items()},
            "vocabulary": len(self.proto.pieces),
        }


def merge_pieces(
    base: Any,
    japanese: Any,
    policy: str,
    *,
    max_new_pieces: int = 0,
    ranking_texts: Iterable[str] = (),
) -> MergedVocabulary:
    """Append the pieces of `japanese` (ModelProto) that `policy` admits to `base` (ModelProto).

    Pieces that could never be produced are left out, except under `all`, which keeps and only
    reports them. With `max_new_pieces`, those pieces are kept that are used most on
    `ranking_texts`, see `uses`.
    """
    known = {piece.piece for piece in base.pieces}.union(SPECIAL_TOKENS)
    candidates = [p.piece for p in japanese.pieces if p.type == p.NORMAL]
    new = [piece for piece in candidates if piece not in known]
    chosen = [piece for piece in new if admits(policy, piece)]
    # Single characters first: every longer piece is merged from them.
    single = {piece for piece in known.union(chosen) if len(piece) == 1}
    unspellable = [piece for piece in chosen if not single.issuperset(piece)]
    if policy != "all":
        chosen = _without(chosen, unspellable)
    unreachable = _unreachable(base, chosen)
    if policy != "all":
        # Once is enough: a piece that never forms takes no part in making another.
        chosen = _without(chosen, unreachable)
    dropped = {
        "already_known": [piece for piece in candidates if piece in known],
        "outside_policy": [piece for piece in new if not admits(policy, piece)],
        "unspellable": unspellable,
        "unreachable": unreachable,
    }
    if max_new_pieces and len(chosen) > max_new_pieces:
        use = count_uses(base, chosen, ranking_texts)
        if not any(use.values()):
            raise DataError(
                "--ranking-sources hold no text that any new piece occurs in: give other texts "
                "or leave --max-new-pieces away"
            )
        # A piece is used at least as often as those made from it, which are longer, so that what
        # remains is still reachable.
        ranked = sorted(chosen, key=lambda piece: (-use[piece], len(piece)))
        past = set(ranked[max_new_pieces:])
        dropped["past_max_new_pieces"] = [piece for piece in chosen if piece in past]
        chosen = _without(chosen, past)
        if policy == "all":  # the two lists name pieces that are added all the same
            for reason in ("unspellable", "unreachable"):
                dropped[reason] = _without(dropped[reason], past)
    return MergedVocabulary(add_special_tokens(base, chosen), chosen, dropped)


def _without(pieces: list[str], left_out: Iterable[str]) -> list[str]:
    left_out = set(left_out)
    return [piece for piece in pieces if piece not in left_out]


def _unreachable(base: Any, pieces: list[str]) -> list[str]:
    """The pieces that no text encodes to when they are added to the base.

    When a piece appears in a text, no merge crossed its borders, so the merges inside it were
    those of the piece alone: it is reachable if and only if it encodes to itself. The dummy
    prefix is switched off for that, because a piece can stand anywhere.
    """
    encoder = make_processor(add_special_tokens(base, pieces), dummy_prefix=False)
    # sentencepiece reads its own mark of a space as one.
    encoded = encoder.encode(pieces)
    return [
        piece
        for piece, ids in zip(pieces, encoded, strict=True)
        if len(ids) != 1 or encoder.id_to_piece(ids[0]) != piece
    ]


def count_uses(base: Any, pieces: list[str], texts: Iterable[str]) -> dict[str, int]:
    """How many merges into each new piece the merged tokenizer makes on these texts.

    That is how often the piece remains as a token, or is a part of a longer one that does. Each
    merge makes the texts one token shorter.
    """
    proto = add_special_tokens(base, pieces)
    encoder = make_processor(proto)
    tokens: Counter[int] = Counter()
    for ids in encode_texts(encoder, texts, num_threads=1):
        tokens.update(ids)
    ranks = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    use = {piece: tokens[encoder.piece_to_id(piece)] for piece in pieces}
    for piece in sorted(pieces, key=len, reverse=True):  # what is made of a piece comes before it
        for part in _parts(piece, ranks):
            if part in use:
                use[part] += use[piece]
    return use


def _parts(piece: str, scores: Mapping[str, float]) -> list[str]:
    """The two pieces whose merge makes a reachable piece; none for a single character."""
    symbols = list(piece)
    while len(symbols) > 2:
        joined = [a + b for a, b in itertools.pairwise(symbols)]
        at = max(range(len(joined)), key=lambda i: (scores.get(joined[i], -math.inf), -i))
        symbols[at : at + 2] = [joined[at]]
    return symbols if len(piece) > 1 else []
