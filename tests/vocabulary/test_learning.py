"""Learning pieces: with sentencepiece, and continued BPE against its definition."""

import hashlib
import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.bases.interface import Vocabulary
from chatglm_ja.bases.sentencepiece_vocabulary import LEARNED_FILE, ChatGLM3Vocabulary
from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.data import corpus
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary import learning, merging
from chatglm_ja.vocabulary.policies import Policy
from tests.conftest import PROJECT, TRAIN_CONFIG, demo_texts

CONTINUE_CONFIG = replace(TRAIN_CONFIG, method="continue", base_model=Path())


def train(texts: Any, **changes: Any) -> Any:
    config = replace(TRAIN_CONFIG, **changes)
    return learning.train_sentencepiece(corpus.training_lines(texts, {}), config)


def test_training_does_not_depend_on_threads_or_the_process() -> None:
    """The fingerprinted bytes must be the same on every machine."""
    script = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from tests.vocabulary.test_learning import train, demo_texts\n"
        "proto = train(demo_texts('ja', 60), num_threads=int(sys.argv[2]))\n"
        "print(hashlib.sha256(proto.SerializeToString()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(PROJECT), threads],
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "3")
    }  # fmt: skip
    here = hashlib.sha256(train(demo_texts("ja", 60)).SerializeToString()).hexdigest()
    assert digests == {here + "\n"}


def test_learned_pieces_fit_the_base(ja_dir: Path) -> None:
    proto = tokenizer.read_proto(ja_dir / LEARNED_FILE)
    assert proto.normalizer_spec.name == "identity"
    assert not proto.normalizer_spec.precompiled_charsmap
    assert len(proto.pieces) == 2500
    pieces = [piece.piece for piece in proto.pieces if piece.type == piece.NORMAL]
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces)
    assert sum(piece.type == piece.BYTE for piece in proto.pieces) == 256
    assert max(map(len, pieces)) <= 16
    vocab = (ja_dir / "ja_bpe.vocab").read_text(encoding="utf-8")
    assert [line.split("\t")[0] for line in vocab.split("\n")[:-1]] == [
        piece.piece for piece in proto.pieces
    ]


def test_an_error_of_the_corpus_is_raised_unchanged() -> None:
    def texts() -> Iterator[str]:
        yield from demo_texts("ja", 50)
        raise DataError("a.jsonl line 51 is not JSON")

    with pytest.raises(DataError, match="line 51 is not JSON"):
        train(texts())


def test_too_little_text_is_refused(base_proto: Any) -> None:
    with pytest.raises(DataError, match=r"could not learn 5000 pieces .*Vocabulary size too high"):
        train(["あいうえお"], vocab_size=5000)
    with pytest.raises(DataError, match=r"gives \d+ pieces, expected 5000"):
        continued(ChatGLM3Vocabulary(base_proto), ["あいうえお"], 5000)


# --- Continuing the base's merges ----------------------------------------------------------------


def continued(
    base: Vocabulary, texts: list[str], vocab_size: int, policy: Policy = Policy.JAPANESE
) -> list[str]:
    config = replace(CONTINUE_CONFIG, policy=policy, vocab_size=vocab_size)
    lines = corpus.training_lines(texts, {})
    merges, characters = learning.continue_merges(base, lines, config)
    return [*map("".join, merges), *characters]


def test_pieces_learned_on_an_export_follow_its_own(merged_proto: Any, tmp_path: Path) -> None:
    """A base that step 8 exported has special tokens among its pieces; they are not learned."""
    hangul = [chr(0xAC00 + offset) for offset in range(41)]
    base = ChatGLM3Vocabulary(merged_proto)
    learned = continued(base, [" ".join(hangul * 5)], 300, Policy.LETTERS)
    assert learned == hangul
    base.save_learned([], learned, tmp_path)
    saved = tokenizer.read_proto(tmp_path / LEARNED_FILE)
    assert [piece.piece for piece in saved.pieces][3 + 256 :] == hangul
    assert saved.trainer_spec.vocab_size == len(saved.pieces) == 300


def test_continuing_drops_no_piece_and_compresses_better(
    base_vocabulary: ChatGLM3Vocabulary, merge: merging.MergedVocabulary
) -> None:
    """With as many new pieces from the same text, held-out Japanese has fewer tokens."""
    control_and_bytes = 3 + 256
    size = control_and_bytes + len(merge.added)
    learned = continued(base_vocabulary, demo_texts("ja", 300), size)
    assert control_and_bytes + len(learned) == size
    from_base = merging.merge_pieces(base_vocabulary, learned, Policy.JAPANESE)
    assert len(from_base.added) == len(merge.added)
    assert not any(from_base.dropped.values())
    texts = demo_texts("ja", 80, "heldout")
    tokens = [sum(map(len, m.vocabulary.encode(texts))) for m in (merge, from_base)]
    assert tokens[1] < tokens[0]


@pytest.mark.parametrize("policy", Policy)
def test_continuing_learns_only_what_the_policy_admits(
    base_vocabulary: ChatGLM3Vocabulary, policy: Policy
) -> None:
    learned = continued(base_vocabulary, demo_texts("ja", 40), 259 + 300, policy)
    merged = merging.merge_pieces(base_vocabulary, learned, policy)
    assert len(merged.added) == 300


# --- Continued BPE, piece by piece ---------------------------------------------------------------


def learn(
    base_proto: Any, lines: Counter[str], policy: Policy, count: int, **changes: Any
) -> tuple[list[str], list[str]]:
    settings = {"max_piece_length": 8, "character_coverage": 1.0, **changes}
    config = replace(CONTINUE_CONFIG, policy=policy, **settings)
    merges, characters = learning.learn_pieces(ChatGLM3Vocabulary(base_proto), lines, count, config)
    return ["".join(pair) for pair in merges], characters


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
def test_every_piece_is_the_most_frequent_pair(
    base_proto: Any, policy: Policy, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recompute merges from scratch: segment with sentencepiece, count, take the most frequent.

    The lines include runs of one character and repeated lines on purpose.
    """
    lines = Counter(corpus.training_lines(demo_texts("ja", 4), {}))
    lines.update(
        ["あああああああ", "ーーーーー", "ははははは は", "します。", "します。", "します。"]
    )
    monkeypatch.setattr(learning, "MIN_OCCURRENCES", least)
    merges, characters = learn(base_proto, lines, policy, 150)
    pieces = [*characters, *merges]
    assert len(pieces) == 150
    for position in range(len(characters), len(pieces), 7):
        counts = pairs(base_proto, pieces[:position], lines, policy)
        assert counts[pieces[position]] == max(counts.values())


@pytest.mark.parametrize("seed", range(12))
def test_colliding_merges(base_proto: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few distinct characters, so that merges are adjacent, overlap and share neighbors."""
    rng = random.Random(seed)
    lines = Counter(
        {
            "".join(rng.choices("かきく ", k=rng.randint(2, 12))): rng.randint(1, 9)
            for _ in range(20)
        }
    )
    monkeypatch.setattr(learning, "MIN_OCCURRENCES", 1)
    merges, characters = learn(base_proto, lines, Policy.KANA, 40)
    pieces = [*characters, *merges]
    for position in range(len(characters), len(pieces)):
        counts = pairs(base_proto, pieces[:position], lines, Policy.KANA)
        assert counts[pieces[position]] == max(counts.values())


def test_learning_ends_when_no_admitted_pair_is_left(
    base_proto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "MIN_OCCURRENCES", 1)
    lines = Counter(["国の形を見る。", "国の形が見える。", "ななななななな"])
    merges, characters = learn(base_proto, lines, Policy.JAPANESE, 500)
    pieces = [*characters, *merges]
    assert 10 < len(pieces) < 500
    assert not pairs(base_proto, pieces, lines, Policy.JAPANESE)


def test_rare_pairs_are_not_learned(base_proto: Any) -> None:
    lines = Counter({"かきくけこ": 1, "さしすせそ": 3})
    merges, _ = learn(base_proto, lines, Policy.JAPANESE, 500)
    assert merges and not any("か" in piece for piece in merges)


def test_characters_come_first_and_by_coverage(base_proto: Any) -> None:
    """込 has no piece in this base, so it is three bytes until it gets one."""
    base = tokenizer.make_processor(base_proto)
    missing = [c for c in "込辻峠働" if base.piece_to_id(c) == tokenizer.UNK_ID]
    assert len(missing) >= 2
    frequent, rare = missing[:2]
    known = base_proto.pieces[-1].piece
    lines = Counter({frequent + known: 500, known * 100: 100, rare + known: 1})
    _, characters = learn(base_proto, lines, Policy.JAPANESE, 50)
    assert characters == [frequent, rare]
    merges, characters = learn(base_proto, lines, Policy.JAPANESE, 50, character_coverage=0.999)
    assert characters == [frequent]
    assert not any(rare in piece for piece in merges)
    _, characters = learn(base_proto, lines, Policy.KANA, 50)
    assert characters == []
