"""Exact duplicates are found."""

import numpy as np

from chatglm_ja.data import dedup


def test_rows_after_an_equal_one_are_repeats() -> None:
    keys = np.array([[1, 2], [3, 4], [1, 2], [1, 3], [1, 2]], dtype=np.uint64)
    assert dedup.mark_repeated(keys).tolist() == [False, False, True, False, True]
    assert dedup.mark_repeated(np.zeros((0, 2), dtype=np.uint64)).tolist() == []


def test_different_texts_have_different_digests() -> None:
    assert dedup.text_digest("あ") == dedup.text_digest("あ") != dedup.text_digest("い")
