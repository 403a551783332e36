"""Continued BPE against its definition, computed with sentencepiece itself."""

import itertools
import random
from collections import Counter
from typing import Any

import pytest

from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.data import corpus
from chatglm_ja.vocabulary import continued_bpe
from chatglm_ja.vocabulary.policies import Policy
from tests.conftest import demo_texts


def learn(base_proto: Any, lines: Counter[str], policy: Policy, count: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "count": count, "admits": policy.admits, "max_piece_length": 8,
        "character_coverage": 1.0, "num_threads": 2, "min_occurrences": 1, **changes,
    }  # fmt: skip
    return continued_bpe.learn(base_proto, lines, **settings)


def pairs(base_proto: Any, pieces: list[str], lines: Counter[str], policy: Policy) -> Counter[str]:
    """Count each admitted pair in the lines as the tokenizer with `pieces` segments them.

    Pairs are named by the piece that they would make.
    """
    proto = tokenizer.add_special_tokens(base_proto, pieces)
    encoder = tokenizer.make_processor(proto, dummy_prefix=False)
    counts: Counter[tuple[str, str]] = Counter()
    for line, weight in lines.items():
        tokens = [proto.pieces[index] for index in encoder.encode(line)]
        for left, right in itertools.pairwise(tokens):
            joined = left.piece + right.piece
            if (
                left.type == left.NORMAL == right.type
                and not any(c.isdigit() for c in joined)
                and "▁" not in right.piece
                and len(joined) <= 8
                and (policy.admits(left.piece) or policy.admits(right.piece))
            ):
                counts[left.piece, right.piece] += weight
    best: Counter[str] = Counter()
    for (left_text, right_text), count in counts.items():
        best[left_text + right_text] = max(best[left_text + right_text], count)
    return best


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("policy", [Policy.JAPANESE, Policy.HAN, Policy.ALL])
def test_every_piece_is_the_most_frequent_pair(base_proto: Any, policy: Policy, least: int) -> None:
    """Recompute merges from scratch: segment with sentencepiece, count, take the most frequent.

    The lines include runs of one character and repeated lines on purpose.
    """
    lines = Counter(corpus.training_lines(demo_texts("ja", 4), {}))
    lines.update(
        ["あああああああ", "ーーーーー", "ははははは は", "します。", "します。", "します。"]
    )
    learned = learn(base_proto, lines, policy, 150, min_occurrences=least)
    pieces = [*learned.characters, *learned.merges]
    assert len(pieces) == 150
    for position in range(len(learned.characters), len(pieces), 7):
        counts = pairs(base_proto, pieces[:position], lines, policy)
        assert counts[pieces[position]] == max(counts.values())


@pytest.mark.parametrize("seed", range(12))
def test_colliding_merges(base_proto: Any, seed: int) -> None:
    """Few distinct characters, so that merges are adjacent, overlap and share neighbors."""
    rng = random.Random(seed)
    lines = Counter(
        {
            "".join(rng.choices("かきく ", k=rng.randint(2, 12))): rng.randint(1, 9)
            for _ in range(20)
        }
    )
    learned = learn(base_proto, lines, Policy.KANA, 40)
    pieces = [*learned.characters, *learned.merges]
    for position in range(len(learned.characters), len(pieces)):
        counts = pairs(base_proto, pieces[:position], lines, Policy.KANA)
        assert counts[pieces[position]] == max(counts.values())


def test_learning_ends_when_no_admitted_pair_is_left(base_proto: Any) -> None:
    lines = Counter(["国の形を見る。", "国の形が見える。", "ななななななな"])
    learned = learn(base_proto, lines, Policy.JAPANESE, 500)
    pieces = [*learned.characters, *learned.merges]
    assert 10 < len(pieces) < 500
    assert not pairs(base_proto, pieces, lines, Policy.JAPANESE)


def test_rare_pairs_are_not_learned(base_proto: Any) -> None:
    lines = Counter({"かきくけこ": 1, "さしすせそ": 3})
    learned = learn(base_proto, lines, Policy.JAPANESE, 500, min_occurrences=2)
    assert learned.merges and not any("か" in piece for piece in learned.merges)


def test_characters_come_first_and_by_coverage(base_proto: Any) -> None:
    """込 has no piece in this base, so it is three bytes until it gets one."""
    base = tokenizer.make_processor(base_proto)
    missing = [c for c in "込辻峠働" if base.piece_to_id(c) == tokenizer.UNK_ID]
    assert len(missing) >= 2
    frequent, rare = missing[:2]
    known = base_proto.pieces[-1].piece
    lines = Counter({frequent + known: 500, known * 100: 100, rare + known: 1})
    assert learn(base_proto, lines, Policy.JAPANESE, 50).characters == [frequent, rare]
    covered = learn(base_proto, lines, Policy.JAPANESE, 50, character_coverage=0.999)
    assert covered.characters == [frequent]
    assert not any(rare in piece for piece in covered.merges)
    assert learn(base_proto, lines, Policy.KANA, 50).characters == []
