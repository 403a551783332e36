"""Filling blocks of a fixed number of tokens with documents or conversations.

Documents run on from block to block, conversations stay whole; E is </s>:

    documents      [a a a] [b b] [c c c c]                block_size = 4
    blocks         [a a a E] [b b E c] [c c c E]          nothing dropped but a counted tail
    lengths        [4]       [3, 1]    [4]                where documents begin in a block

    conversations  [a a a] [b b] [c] [d d]                max_length = 4
    bins           [a a a c] [b b d d]                    best fit, longest first

`lengths` lets training restart positions and keep attention inside each document.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

Block = tuple[list[int], list[int]]  # input_ids, lengths of the documents in it


def concat(documents: Iterable[Sequence[int]], block_size: int) -> Iterator[Block]:
    """Concatenate documents and cut them into full blocks; the ragged tail comes last, shorter."""
    ids: list[int] = []
    lengths: list[int] = []
    for document in documents:
        start = 0
        while start < len(document):
            part = document[start : start + block_size - len(ids)]
            ids += part
            lengths.append(len(part))
            start += len(part)
            if len(ids) == block_size:
                yield ids, lengths
                ids, lengths = [], []
    if ids:
        yield ids, lengths


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: indices of the items in each bin.

    The longest item first, each into the fullest bin that still has room. Bins of equal room are
    interchangeable, so they are kept by room, and finding the best one costs a binary search.
    Raises ValueError for an item longer than `capacity`.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the rooms for which there is a bin, sorted
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[item]
        if not 0 < length <= capacity:
            raise ValueError(f"item {item} has length {length}, expected 1 to {capacity}")
        position = bisect.bisect_left(rooms, length)
        if position < len(rooms):
            room = rooms[position]
            target = by_room[room].pop()
            if not by_room[room]:
                del rooms[position]
        else:
            room, target = capacity, len(bins)
            bins.append([])
        bins[target].append(item)
        room -= length
        if room:
            if not by_room[room]:
                bisect.insort(rooms, room)
            by_room[room].append(target)
    return bins
