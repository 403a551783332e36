"""Continued BPE: learning Japanese pieces that continue the base's own merges.

A vocabulary learned from characters ignores the merges that the base does first. Many of its pieces
can then never be produced: the base has merged 情報 before 報を could form. Continued BPE
(arXiv:2512.03989) starts where the base's merges end. The base tokenizer segments the text, and the
most frequent pair of adjacent tokens becomes the next piece, again and again:

    characters   情 報 を 表 示 し ま す
    base         情報 を 表示 し ま す          the base's merges, which always come first
    learned      情報 を 表示 します            しま, then します; later 表示します ...

Only pairs that make a piece the policy admits are counted, so step 2 drops none of the pieces.
After n pieces the training text is segmented exactly as by the merged tokenizer with these n
pieces, and every piece is reachable.

This is classic BPE with an index of the pairs (Sennrich et al., arXiv:1508.07909). All occurrences
of a pair are merged at once in numpy. The text is one array of symbols, linked so that a merge
removes a symbol in constant time:

    symbols    情報 を 表示 し ま す -1 ...    -1 ends a segment; a repeated segment is stored once
    following   1   2   3   4  5  6            with its count as weight
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from chatglm_ja.chatglm3.tokenizer import SPACE, add_special_tokens, make_processor

Ints = NDArray[np.integer]

END, MERGED = -1, -2  # instead of a symbol: the end of a segment, the right half of a merge
RIGHT_BITS = 32  # a pair is one integer: left symbol << 32 | right symbol
BATCH_LINES = 20_000


@dataclass(frozen=True)
class Learned:
    """New pieces in the order learned, and new single-character pieces."""

    merges: list[str]
    characters: list[str]


def learn(
    base: Any,
    lines: Counter[str],
    *,
    count: int,
    admits: Callable[[str], bool],
    max_piece_length: int,
    character_coverage: float,
    num_threads: int,
    min_occurrences: int = 2,
) -> Learned:
    """Learn up to `count` pieces that continue the merges of `base` (a ModelProto).

    `lines` maps each line of text to its count. `admits` must admit a piece if and only if it
    admits one of its characters. Like the base's, pieces have at most `max_piece_length`
    characters, no digit, and a space only at the start. Characters among the most frequent
    `character_coverage` of the text get a piece first. Returns fewer than `count` pieces if no
    remaining pair occurs `min_occurrences` times.
    """
    characters = _characters(base, lines, character_coverage, admits)[:count]
    with_characters = add_special_tokens(base, characters)
    symbols = _Symbols(with_characters, admits)
    text, weights = _segments(with_characters, lines, symbols, num_threads)
    state = _State(text, weights, symbols, max_piece_length, min_occurrences)
    merges: list[str] = []
    with tqdm(total=count - len(characters), desc="learning", unit=" pieces") as bar:
        for piece in itertools.islice(state.merge(), count - len(characters)):
            merges.append(piece)
            bar.update()
    return Learned(merges, characters)


def _characters(
    base: Any, lines: Counter[str], coverage: float, admits: Callable[[str], bool]
) -> list[str]:
    """Return the admitted characters without a base piece among the most frequent `coverage`."""
    totals = np.zeros(0x110000, dtype=np.int64)
    for batch in _batches(lines):
        text = "".join(line for line, _ in batch)
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        weights = np.repeat([n for _, n in batch], [len(line) for line, _ in batch])
        totals += np.bincount(codes, weights, minlength=len(totals)).astype(np.int64)
    order = np.argsort(-totals, kind="stable")
    before = np.cumsum(totals[order]) - totals[order]  # count of all more frequent characters
    covered = order[(before < coverage * totals.sum()) & (totals[order] > 0)]
    known = {piece.piece for piece in base.pieces}
    return [
        character
        for character in map(chr, covered.tolist())
        if character not in known
        and admits(character)
        and not (character.isdigit() or character.isspace())
    ]


def _batches(lines: Counter[str]) -> Iterator[list[tuple[str, int]]]:
    items = iter(lines.items())
    while batch := list(itertools.islice(items, BATCH_LINES)):
        yield batch


class _Symbols:
    """The texts of all symbols, and the properties that decide whether two of them may merge."""

    def __init__(self, proto: Any, admits: Callable[[str], bool]) -> None:
        normal = [piece.type == piece.NORMAL for piece in proto.pieces]
        self.texts = [piece.piece for piece in proto.pieces]
        self.length = np.array([len(text) for text in self.texts], dtype=np.int32)
        self.admitted = np.array(normal) & [admits(text) for text in self.texts]
        self.has_space = np.array([SPACE in text for text in self.texts])
        has_digit = [any(map(str.isdigit, text)) for text in self.texts]
        self.mergeable = np.array(normal) & ~np.array(has_digit)

    def add(self, text: str) -> int:
        """Add a symbol for a new, admitted piece and return its number."""
        index = len(self.texts)
        self.texts.append(text)
        if index == len(self.length):  # grow by doubling
            spare = np.zeros(index, dtype=np.int32)
            self.length = np.concatenate([self.length, spare])
            self.admitted = np.concatenate([self.admitted, spare > 0])
        self.length[index] = len(text)
        self.admitted[index] = True
        return index


def _segments(
    proto: Any, lines: Counter[str], symbols: _Symbols, num_threads: int
) -> tuple[NDArray[np.int32], Ints]:
    """Tokenize the lines and split them into segments inside which new pieces can form.

    A segment ends before and after a token that never merges (bytes, digits) and before a space.
    Segments without an admitted character or with a single token are dropped. Returns the symbols
    of all distinct segments, END after each, and for every symbol the count of its segment.
    """
    # Only the start of a whole document has the dummy prefix.
    tokenizer = make_processor(proto, dummy_prefix=False)
    counts: Counter[bytes] = Counter()
    for batch in _batches(lines):
        encoded = tokenizer.encode([line for line, _ in batch], num_threads=num_threads)
        sizes = np.array([len(ids) for ids in encoded])
        flat = np.fromiter(
            itertools.chain.from_iterable(encoded), dtype=np.int32, count=int(sizes.sum())
        )
        if not len(flat):
            continue
        weights = np.repeat([n for _, n in batch], sizes)
        starts_line = np.zeros(len(flat) + 1, dtype=bool)
        starts_line[np.concatenate([[0], np.cumsum(sizes)])] = True
        fixed = ~symbols.mergeable[flat]
        begins = starts_line[:-1] | fixed | symbols.has_space[flat]
        begins[1:] |= fixed[:-1]
        starts = np.flatnonzero(begins)
        ends = np.append(starts[1:], len(flat))
        useful = np.logical_or.reduceat(symbols.admitted[flat], starts) & (ends - starts > 1)
        for start, end in zip(starts[useful].tolist(), ends[useful].tolist(), strict=True):
            counts[flat[start:end].tobytes()] += int(weights[start])
    end_mark = np.array([END], dtype=np.int32).tobytes()
    flat = np.frombuffer(b"".join(key + end_mark for key in counts), dtype=np.int32).copy()
    sizes = np.array([len(key) // 4 + 1 for key in counts], dtype=np.int64)
    return flat, np.repeat(np.array(list(counts.values()), dtype=np.int32), sizes)


class _State:
    """The text as linked symbols, and for every pair its count and candidate positions."""

    def __init__(
        self,
        text: NDArray[np.int32],
        weights: Ints,
        symbols: _Symbols,
        max_piece_length: int,
        min_occurrences: int,
    ) -> None:
        self.text = text
        self.weights = weights
        self.symbols = symbols
        self.max_piece_length = max_piece_length
        self.min_occurrences = min_occurrences
        size = len(text)
        self.following = np.arange(1, size + 1, dtype=np.int32)
        self.preceding = np.arange(-1, size - 1, dtype=np.int32)
        self.is_left = np.zeros(size, dtype=bool)  # scratch: left halves of the current merge
        self.counts: dict[int, int] = {}
        # Positions of left halves. Other merges may have changed them, so they are checked on use.
        self.positions: dict[int, list[Ints]] = {}
        self.queue: list[tuple[int, int]] = []
        self._add_pairs(np.flatnonzero(self.text[:-1] >= 0).astype(np.int32))

    def merge(self) -> Iterator[str]:
        """Merge the most frequent pair, again and again; yield each new piece.

        A piece is made by one pair only, since its text is segmented in the same way everywhere.
        """
        while self.queue:
            negative, pair = heapq.heappop(self.queue)
            count = self.counts.get(pair, 0)
            if count != -negative:  # other merges took some of its occurrences
                if count >= self.min_occurrences:
                    heapq.heappush(self.queue, (-count, pair))
                continue
            left, right = pair >> RIGHT_BITS, pair & (2**RIGHT_BITS - 1)
            text = self.symbols.texts[left] + self.symbols.texts[right]
            self._merge_pair(pair, self.symbols.add(text))
            yield text

    def _add_pairs(self, left_at: Ints) -> None:
        """Count and index the pairs whose left symbols are at these positions."""
        left = self.text[left_at].astype(np.int64)
        right_at = self.following[left_at]
        right = self.text[right_at].astype(np.int64)
        admitted, length = self.symbols.admitted, self.symbols.length
        allowed = (right >= 0) & (admitted[left] | admitted[right])
        allowed &= length[left] + length[right] <= self.max_piece_length
        if not allowed.any():
            return
        left_at = left_at[allowed]
        pairs = left[allowed] << RIGHT_BITS | right[allowed]
        order, starts, groups, totals = _grouped(pairs, self.weights[left_at])
        sorted_at = left_at[order]
        ends = np.append(starts[1:], len(order))
        for group in np.flatnonzero(totals >= self.min_occurrences).tolist():
            pair, total = int(groups[group]), int(totals[group])
            self.counts[pair] = self.counts.get(pair, 0) + total
            positions = sorted_at[starts[group] : ends[group]]
            self.positions.setdefault(pair, []).append(positions)
            heapq.heappush(self.queue, (-self.counts[pair], pair))

    def _remove_pairs(self, left_at: Ints) -> None:
        """Subtract the pairs whose left symbols are at these positions, which are to disappear."""
        pairs = self.text[left_at].astype(np.int64) << RIGHT_BITS
        pairs |= self.text[self.following[left_at]].astype(np.int64)
        _, _, groups, totals = _grouped(pairs, self.weights[left_at])
        for pair, total in zip(groups.tolist(), totals.tolist(), strict=True):
            if pair in self.counts:
                self.counts[pair] -= total

    def _merge_pair(self, pair: int, index: int) -> None:
        """Replace every occurrence of the pair by the symbol `index`."""
        at = np.unique(np.concatenate(self.positions.pop(pair)))
        left, right = pair >> RIGHT_BITS, pair & (2**RIGHT_BITS - 1)
        at = at[self.text[at] == left]
        at = at[self.text[self.following[at]] == right]
        if left == right:
            at = self._without_overlaps(at)
        del self.counts[pair]
        if not len(at):
            return
        right_at = self.following[at]
        before, after = self.preceding[at], self.following[right_at]
        self.is_left[at] = True
        # Update the pairs with both neighbors. If the neighbor on the left is itself an occurrence,
        # the pair of the two is counted once, as the right-hand pair of that one.
        has_before = before >= 0
        has_before[has_before] = self.text[before[has_before]] >= 0
        previous_merges = np.zeros(len(at), dtype=bool)
        second = self.preceding[before[has_before]]
        previous_merges[has_before] = (second >= 0) & self.is_left[second]
        previous_merges[has_before] &= self.following[second] == before[has_before]
        has_after = self.text[after] >= 0
        self._remove_pairs(before[has_before & ~previous_merges])
        self._remove_pairs(right_at[has_after])
        self.text[at] = index
        self.text[right_at] = MERGED
        self.following[at] = after
        self.preceding[after] = at
        outer_left = before[has_before & ~previous_merges]
        self._add_pairs(np.concatenate([outer_left, at[has_after]]))
        self.is_left[at] = False

    def _without_overlaps(self, at: Ints) -> Ints:
        """Drop overlapping occurrences: in x x x the first two merge, as in the tokenizer."""
        positions, right_half = [], END
        for position in at.tolist():
            if position != right_half:
                positions.append(position)
                right_half = int(self.following[position])
        return np.array(positions, dtype=np.int32)


def _grouped(pairs: Ints, weights: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Group equal pairs.

    Returns the order that sorts the pairs, then for each distinct pair its start in that order, its
    value, and the sum of its weights.
    """
    order = np.argsort(pairs, kind="stable")
    if not len(pairs):
        return order, order, pairs, weights
    pairs = pairs[order]
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    return order, starts, pairs[starts], np.add.reduceat(weights[order], starts, dtype=np.int64)
