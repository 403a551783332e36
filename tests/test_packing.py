"""Packing: nothing lost, nothing cut that may not be cut, and full bins."""

import random

import pytest

from chatglm_ja import packing


def test_concat_keeps_every_token_in_order() -> None:
    random.seed(0)
    documents = [list(range(100 * i, 100 * i + random.randint(0, 40))) for i in range(50)]
    blocks = list(packing.concat(documents, 16))
    assert [token for ids, _ in blocks for token in ids] == [
        token for document in documents for token in document
    ]
    assert all(len(ids) == 16 for ids, _ in blocks[:-1])
    assert all(sum(lengths) == len(ids) and min(lengths) > 0 for ids, lengths in blocks)


def test_concat_marks_where_documents_begin() -> None:
    blocks = list(packing.concat([[1, 1, 1, 0], [2, 2, 0], [3, 3, 3, 3, 0]], 4))
    assert blocks == [
        ([1, 1, 1, 0], [4]),
        ([2, 2, 0, 3], [3, 1]),
        ([3, 3, 3, 0], [4]),
    ]


def test_best_fit_packs_every_item_once_within_the_capacity() -> None:
    random.seed(1)
    lengths = [min(5 + int(random.expovariate(1 / 60)), 256) for _ in range(3000)]
    bins = packing.best_fit(lengths, 256)
    assert sorted(index for members in bins for index in members) == list(range(3000))
    assert max(sum(lengths[i] for i in members) for members in bins) <= 256
    assert sum(lengths) / (len(bins) * 256) > 0.98


def test_best_fit_agrees_with_a_direct_search() -> None:
    """The definition, in quadratic time: each item into the fullest bin with room."""
    random.seed(2)
    for _ in range(20):
        lengths = [random.randint(1, 50) for _ in range(60)]
        rooms: list[int] = []
        for length in sorted(lengths, reverse=True):
            fitting = [i for i, room in enumerate(rooms) if room >= length]
            if fitting:
                rooms[min(fitting, key=lambda i: rooms[i])] -= length
            else:
                rooms.append(50 - length)
        bins = packing.best_fit(lengths, 50)
        filled = sorted(50 - sum(lengths[i] for i in members) for members in bins)
        assert filled == sorted(rooms)


def test_best_fit_refuses_an_item_that_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="length 11, expected 1 to 10"):
        packing.best_fit([3, 11], 10)
