"""Duplicates: signatures estimate similarity, linked texts keep the first, overlaps are found."""

import random

import numpy as np
import pytest

from chatglm_ja.data import cleaning, dedup


def sign(texts: list[str]) -> np.ndarray:
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return dedup.minhash_signatures(cleaning.code_points(texts), lengths)


def shingles(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def random_text(rng: random.Random, size: int) -> str:
    return "".join(chr(rng.randrange(0x3041, 0x3090)) for _ in range(size))


def altered(rng: random.Random, text: str, changes: int) -> str:
    characters = list(text)
    for place in rng.sample(range(len(text)), changes):
        characters[place] = "漢"
    return "".join(characters)


def test_signatures_estimate_the_similarity_of_sets() -> None:
    rng = random.Random(0)
    base = random_text(rng, 1500)
    texts = [base, *(altered(rng, base, n) for n in (0, 5, 20, 60, 150)), random_text(rng, 1500)]
    signatures = sign(texts)
    for text, signature in zip(texts, signatures, strict=True):
        true = len(shingles(base) & shingles(text)) / len(shingles(base) | shingles(text))
        assert np.mean(signature == signatures[0]) == pytest.approx(true, abs=0.13)  # 3 deviations


def test_a_signature_does_not_depend_on_the_batch() -> None:
    rng = random.Random(1)
    texts = ["あ", "ab", "abcd", "abcde", random_text(rng, 300), "あ", "abcdef"]
    together = sign(texts)
    for text, signature in zip(texts, together, strict=True):
        assert (sign([text])[0] == signature).all()
    assert (together[0] == together[5]).all()
    assert not (together[0] == together[1]).all()
    assert sign([]).shape == (0, dedup.NUM_HASHES)


def find(texts: list[str], threshold: float) -> list[bool]:
    signatures = sign(texts)
    size = dedup.BAND_SIZE
    near = dedup.find_near_duplicates(
        len(texts),
        lambda band: signatures[:, band * size : (band + 1) * size],
        lambda indices: signatures[indices],
        threshold,
    )
    return list(near)


def test_near_duplicates_are_those_above_the_threshold() -> None:
    rng = random.Random(2)
    originals = [random_text(rng, 800) for _ in range(60)]
    near = [altered(rng, text, 4) for text in originals]  # similarity 0.95
    far = [altered(rng, text, 80) for text in originals]  # similarity 0.45
    assert find([*originals, *near, *far], 0.8) == [False] * 60 + [True] * 60 + [False] * 60


def test_pairs_are_compared_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "PAIRS_AT_ONCE", 3)
    test_near_duplicates_are_those_above_the_threshold()


def test_the_first_of_linked_texts_stays() -> None:
    rng = random.Random(3)
    chain = [random_text(rng, 1000)]
    for _ in range(5):
        chain.append(altered(rng, chain[-1], 8))
    order = [3, 0, 5, 1, 4, 2]
    assert find([chain[i] for i in order], 0.8) == [False, *[True] * 5]


def test_rows_after_an_equal_one_are_repeats() -> None:
    keys = np.array([[1, 2], [3, 4], [1, 2], [1, 3], [1, 2]], dtype=np.uint64)
    assert dedup.mark_repeated(keys).tolist() == [False, False, True, False, True]
    assert dedup.mark_repeated(np.zeros((0, 2), dtype=np.uint64)).tolist() == []


def test_thirteen_tokens_in_a_row_are_an_overlap() -> None:
    rng = np.random.default_rng(4)
    evaluation = [rng.integers(0, 60_000, 50, dtype=np.int32) for _ in range(20)]
    known = dedup.overlap_hashes(evaluation)
    assert len(known) == 20 * 38
    noise = rng.integers(0, 60_000, 100, dtype=np.int32)
    assert not dedup.has_overlap(noise, known)
    for size, expected in ((13, True), (12, False)):
        text = np.concatenate([noise, evaluation[7][20 : 20 + size], noise])
        assert dedup.has_overlap(text, known) is expected
    assert not dedup.has_overlap(evaluation[0][:5], known)
    assert not dedup.has_overlap(noise, dedup.overlap_hashes([]))


def test_different_texts_have_different_digests() -> None:
    assert dedup.text_digest("あ") == dedup.text_digest("あ") != dedup.text_digest("い")
