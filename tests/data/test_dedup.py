"""Exact duplicates and overlaps with evaluation texts are found."""

import numpy as np

from chatglm_ja.data import dedup


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
