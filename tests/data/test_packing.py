"""Packing: no token is lost, only what must be cut is cut, and bins are full."""

import random

import numpy as np
import pytest

from chatglm_ja.data import packing
from chatglm_ja.data.packing import PackingPlan


def pack(plan: PackingPlan, items: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Assemble the blocks' tokens and lengths."""
    blocks = []
    for first, end in zip(plan.bounds, plan.bounds[1:], strict=False):
        ids: list[int] = []
        lengths = []
        for item, start, length in zip(
            plan.item[first:end], plan.start[first:end], plan.length[first:end], strict=True
        ):
            ids += items[item][start : start + length]
            lengths.append(int(length))
        blocks.append((ids, lengths))
    return blocks


def sizes(items: list[list[int]]) -> np.ndarray:
    return np.array([len(item) for item in items])


def random_items(count: int, longest: int) -> list[list[int]]:
    return [list(range(100 * i, 100 * i + random.randint(1, longest))) for i in range(count)]


@pytest.mark.parametrize("keep_tail", [False, True])
def test_concat_keeps_every_token_in_order(keep_tail: bool) -> None:
    random.seed(0)
    items = random_items(50, 40)
    blocks = pack(packing.plan_concat(sizes(items), 16, keep_tail), items)
    stream = [token for item in items for token in item]
    kept = len(stream) if keep_tail else len(stream) // 16 * 16
    assert [token for ids, _ in blocks for token in ids] == stream[:kept]
    assert all(len(ids) == 16 for ids, _ in blocks[: kept // 16])
    assert all(sum(lengths) == len(ids) and min(lengths) > 0 for ids, lengths in blocks)


def test_concat_marks_where_documents_begin() -> None:
    items = [[1, 1, 1, 0], [2, 2, 0], [3, 3, 3, 3, 0]]
    blocks = pack(packing.plan_concat(sizes(items), 4), items)
    assert blocks == [([1, 1, 1, 0], [4]), ([2, 2, 0, 3], [3, 1]), ([3, 3, 3, 0], [4])]


def test_no_items_give_no_blocks() -> None:
    nothing, short = np.array([], dtype=int), np.array([3])
    plans = [packing.plan_concat(nothing, 4), packing.plan_concat(short, 4)]
    for plan in [*plans, packing.plan_best_fit(nothing, 4), packing.join_plans([])]:
        assert len(plan) == len(plan.item) == 0


def test_best_fit_cuts_only_what_is_longer_than_a_block() -> None:
    random.seed(3)
    items = random_items(200, 90)
    blocks = pack(packing.plan_best_fit(sizes(items), 32), items)
    pieces: dict[int, list[int]] = {}
    for ids, lengths in blocks:
        assert len(ids) == sum(lengths) <= 32
        start = 0
        for length in lengths:
            piece = ids[start : start + length]
            pieces.setdefault(piece[0] // 100, []).append(length)
            start += length
    assert sum(map(len, items)) == sum(sum(lengths) for lengths in pieces.values())
    for index, item in enumerate(items):
        full, rest = divmod(len(item), 32)
        assert sorted(pieces[index]) == sorted([32] * full + [rest] * (rest > 0))


def test_large_blocks_are_filled_in_units_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_SEARCHED", 64)
    random.seed(6)
    for capacity in (500, 512, 1001):
        lengths = np.array([random.randint(1, 2 * capacity) for _ in range(300)] + [capacity] * 3)
        plan = packing.plan_best_fit(lengths, capacity)
        assert plan.block_lengths().max() <= capacity
        assert np.bincount(plan.item, weights=plan.length).tolist() == lengths.tolist()
        assert lengths.sum() / (len(plan) * capacity) > 0.9


def test_a_plan_takes_blocks_in_any_order() -> None:
    random.seed(4)
    items = random_items(40, 20)
    plan = packing.plan_concat(sizes(items), 8)
    order = np.random.default_rng(0).permutation(len(plan))[:10]
    blocks = pack(plan, items)
    assert pack(plan.take(order), items) == [blocks[index] for index in order]
    assert plan.take(order).block_lengths().tolist() == [8] * 10
    joined = packing.join_plans([plan, plan.take(order)])
    assert pack(joined, items) == blocks + [blocks[index] for index in order]


def bins_of(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return the indices of the items in each bin."""
    members, numbers = packing.fill_bins(np.array(lengths, dtype=np.int64), capacity)
    return [part.tolist() for part in np.split(members, np.cumsum(numbers)[:-1])] if lengths else []


def test_bins_hold_every_item_once_within_the_capacity() -> None:
    random.seed(1)
    lengths = [min(5 + int(random.expovariate(1 / 60)), 256) for _ in range(3000)]
    bins = bins_of(lengths, 256)
    assert sorted(index for members in bins for index in members) == list(range(3000))
    assert max(sum(lengths[i] for i in members) for members in bins) <= 256
    assert sum(lengths) / (len(bins) * 256) > 0.99


def test_a_bin_is_as_full_as_possible() -> None:
    """Minimum bin slack: with its longest item, a bin is as full as the items left can make it."""
    random.seed(2)
    for _ in range(20):
        lengths = [random.randint(1, 50) for _ in range(40)]
        left = list(range(40))
        for members in bins_of(lengths, 50):
            assert max(lengths[i] for i in members) == max(lengths[i] for i in left)
            longest = max(members, key=lambda i: lengths[i])
            sums = {lengths[longest]}
            for other in left:
                if other != longest:
                    sums |= {total + lengths[other] for total in sums}
            assert sum(lengths[i] for i in members) == max(total for total in sums if total <= 50)
            left = [i for i in left if i not in members]
        assert not left


def test_bins_are_at_least_as_full_as_best_fit_decreasing_makes_them() -> None:
    random.seed(5)
    for low, high in ((150, 400), (30, 300), (400, 700)):
        lengths = [random.randint(low, high) for _ in range(2000)]
        rooms: list[int] = []
        for length in sorted(lengths, reverse=True):
            fitting = [i for i, room in enumerate(rooms) if room >= length]
            if fitting:
                rooms[min(fitting, key=lambda i: rooms[i])] -= length
            else:
                rooms.append(1024 - length)
        assert len(bins_of(lengths, 1024)) <= len(rooms)


def test_an_item_that_fits_no_bin_is_refused() -> None:
    for bad in (11, 0):
        with pytest.raises(ValueError, match=f"length {bad}, expected 1 to 10"):
            bins_of([3, bad], 10)
