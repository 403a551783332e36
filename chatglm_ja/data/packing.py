"""Packing documents or conversations into blocks of a fixed number of tokens.

A plan says which part of which document lies where, before any token is read; E is </s>:

    documents      [a a a E] [b b E] [c c c c E]              block_size = 4

    concat         [a a a E] [b b E c] [c c c E]              every block is full; the tail that
      lengths      [4]       [3, 1]    [4]                    fills none is dropped or kept

    best_fit       [c c c c] [a a a E] [b b E E]              c is longer than a block and cut; the
      lengths      [4]       [4]       [3, 1]                 others stay whole

`lengths` lets training restart positions and keep attention inside each document. Cutting only
what must be cut leaves a model more whole documents to learn from (Ding et al. 2024, arXiv
2404.10830).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Larger capacities are searched in units of several tokens.
MAX_SEARCHED = 4096


@dataclass(frozen=True)
class PackingPlan:
    """Blocks as segments of items (documents or conversations); int64 arrays.

    item, start, length    [segments]: a segment is tokens start .. start + length of an item
    bounds                 [blocks + 1]: block b holds segments bounds[b] .. bounds[b + 1]
    """

    item: np.ndarray
    start: np.ndarray
    length: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def block_lengths(self) -> np.ndarray:
        """Return the number of tokens in each block, int64 [blocks]."""
        before = np.concatenate([[0], np.cumsum(self.length)])[self.bounds]
        return np.diff(before)

    def take(self, blocks: np.ndarray) -> "PackingPlan":
        """Return a plan of the given blocks, in their order."""
        sizes = np.diff(self.bounds)[blocks]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        inside = np.arange(bounds[-1]) - np.repeat(bounds[:-1], sizes)
        segments = np.repeat(self.bounds[blocks], sizes) + inside
        return PackingPlan(self.item[segments], self.start[segments], self.length[segments], bounds)

    def shuffle(self, seed: int) -> "PackingPlan":
        """Return the plan with its blocks in random order: best fit sorts them by their items."""
        return self.take(np.random.default_rng(seed).permutation(len(self)))


def join_plans(plans: Sequence[PackingPlan]) -> PackingPlan:
    """Return one plan of the blocks of several plans."""
    bounds, end = [np.zeros(1, dtype=np.int64)], 0
    for plan in plans:
        bounds.append(plan.bounds[1:] + end)
        end += len(plan.item)
    empty = np.zeros(0, dtype=np.int64)
    return PackingPlan(
        np.concatenate([empty, *(plan.item for plan in plans)]),
        np.concatenate([empty, *(plan.start for plan in plans)]),
        np.concatenate([empty, *(plan.length for plan in plans)]),
        np.concatenate(bounds),
    )


def plan_concat(lengths: np.ndarray, block_size: int, keep_tail: bool = False) -> PackingPlan:
    """Plan full blocks of concatenated items of the given lengths.

    The tokens after the last full block are dropped, or make a shorter block with `keep_tail`.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    stop = total if keep_tail else total - total % block_size
    blocks = np.arange(0, stop, block_size)
    cuts = np.union1d(starts[starts < stop], blocks)
    item = np.searchsorted(ends, cuts, side="right")
    return PackingPlan(
        item,
        cuts - starts[item],
        np.diff(cuts, append=stop),
        np.concatenate([np.searchsorted(cuts, blocks), [len(cuts)]]),
    )


def plan_best_fit(lengths: np.ndarray, capacity: int) -> PackingPlan:
    """Plan blocks of whole items; an item longer than `capacity` fills blocks and leaves a rest."""
    full, rest = np.divmod(lengths.astype(np.int64), capacity)
    owner = np.repeat(np.arange(len(lengths)), full)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    cut = PackingPlan(
        owner,
        nth * capacity,
        np.full(len(owner), capacity, dtype=np.int64),
        np.arange(len(owner) + 1),
    )
    left = np.flatnonzero(rest)
    # In units of a few tokens, rounded up: the time grows with the square of the capacity.
    unit = -(-capacity // MAX_SEARCHED)
    units = np.minimum(-(-rest[left] // unit), capacity // unit)
    members, sizes = fill_bins(units, capacity // unit)
    members = left[members]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return join_plans([cut, PackingPlan(members, full[members] * capacity, rest[members], bounds)])


def fill_bins(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill bins with items; return the items, bin by bin, and the number of items in each bin.

    A bin gets the longest item left and, of all selections of other items, the one that fills the
    rest best (minimum bin slack, Gupta and Ho 1999). Of equally good selections it gets that with
    longer items, since these are harder to place later. Items of equal length are interchangeable:
    the search works on a histogram of lengths and uses each selection for as many bins as there are
    items for (Krell et al. 2021, arXiv 2107.02027), so the time depends on the capacity, hardly on
    the number of items. Raises ValueError for a length that fits no bin.
    """
    order = np.argsort(-lengths, kind="stable")
    values, numbers = np.unique(lengths, return_counts=True)
    if len(values) and not 0 < values[0] <= values[-1] <= capacity:
        bad = values[0] if values[0] <= 0 else values[-1]
        raise ValueError(f"an item has length {bad}, expected 1 to {capacity}")
    left = values.tolist()
    counts = dict(zip(left, numbers.tolist(), strict=True))
    # The first unused item of each length in `order`.
    starts = dict(zip(left, (len(lengths) - np.cumsum(numbers)).tolist(), strict=True))
    members, sizes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    while left:
        longest = left[-1]
        counts[longest] -= 1
        selection = _fullest(left, counts, capacity - longest)
        counts[longest] += 1
        selection[longest] = selection.get(longest, 0) + 1
        bins = min(counts[length] // number for length, number in selection.items())
        columns = []
        for length, number in selection.items():
            first = starts[length]
            starts[length] += bins * number
            counts[length] -= bins * number
            columns.append(order[first : starts[length]].reshape(bins, number))
        members.append(np.concatenate(columns, axis=1).ravel())
        sizes.append(np.full(bins, sum(selection.values()), dtype=np.int64))
        left = [length for length in left if counts[length]]
    return np.concatenate(members), np.concatenate(sizes)


def _fullest(lengths: Sequence[int], counts: dict[int, int], room: int) -> dict[int, int]:
    """Return the selection of items with the largest sum up to `room`; `lengths` are sorted.

    reach[j] is the set of sums that the first j lengths can give, as the bits of an integer.
    """
    within = (1 << (room + 1)) - 1
    reach = [1]
    used = []
    for length in lengths:
        if length > room:
            break
        left, step, sums = min(counts[length], room // length), 1, reach[-1]
        while left:  # every number of items up to `left`, in binary steps
            number = min(step, left)
            sums |= sums << (length * number)
            left, step = left - number, 2 * step
        reach.append(sums & within)
        used.append(length)
    target = reach[-1].bit_length() - 1
    selection = {}
    for place in range(len(used) - 1, -1, -1):
        length = used[place]
        number = min(counts[length], target // length)
        while not reach[place] >> (target - number * length) & 1:
            number -= 1
        if number:
            selection[length] = number
            target -= number * length
    return selection
