"""Learning Japanese pieces by continuing the base's own merges, instead of from characters.

A vocabulary that is learned from characters knows nothing of the merges that the base does first.
Many of its pieces can then never be produced: the base has joined 情報 before 報を could form. Here
byte-pair encoding starts where the base's ends. The text is cut by the base tokenizer, and the pair
of neighbouring tokens that occurs most often becomes the next piece, over and over:

    characters   情 報 を 表 示 し ま す
    base         情報 を 表示 し ま す          the base's merges, as they will always be done first
    learned      情報 を 表示 します            しま, then します; later 表示します ...

(Continued BPE, arXiv:2512.03989.) A pair is counted only if the piece it makes is admitted by the
policy, so that nothing of the budget goes to pieces that the merge would drop. After n pieces
the state of the training text is exactly how the merged tokenizer with these n pieces cuts it, and
every piece is reachable.

Classic BPE with an index of the pairs (Sennrich et al., arXiv:1508.07909), all occurrences of a
pair merged at once in numpy. The text is kept as one array of symbols, linked so that a merge
removes a symbol in constant time:

    symbols    情報 を 表示 し ま す -1 ...    -1 ends a segment; segments that repeat are kept once
    following   1   2   3   4  5  6            with a weight
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

END, MERGED = -1, -2  # in place of a symbol: the end of a segment, the right half of a merge
RIGHT_BITS = 32  # a pair is one integer: left symbol << 32 | right symbol
BATCH_LINES = 20_000


@dataclass(frozen=True)
class Learned:
    """New pieces in the order learned, and the characters that the base has no piece for."""

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

    `lines` maps lines of text to how often they occur. `admits` decides by single characters: a
    piece is admitted if one of its characters is. Pieces hold at most `max_piece_length`
    characters, no digit, and a space only at their start, like the base's. Characters that
    belong to the most frequent `character_coverage` of the text get a piece before all merges.
    Fewer than `count` come back when no pair occurs `min_occurrences` times.
    """
    characters = _characters(base, lines, character_coverage, admits)[:count]
    with_characters = add_special_tokens(base, characters)
    symbols = _Symbols(with_characters, admits)
    segments = _segments(with_characters, lines, symbols, num_threads)
    state = _State(segments, symbols, max_piece_length, min_occurrences)
    merges: list[str] = []
    with tqdm(total=count - len(characters), desc="learning", unit=" pieces") as bar:
        for piece in itertools.islice(state.merge(), count - len(characters)):
            merges.append(piece)
            bar.update()
    return Learned(merges, characters)


def _characters(
    base: Any, lines: Counter[str], coverage: float, admits: Callable[[str], bool]
) -> list[str]:
    """The admitted characters without a base piece among the most frequent `coverage`."""
    totals = np.zeros(0x110000, dtype=np.int64)
    for batch in _batches(lines):
        text = "".join(line for line, _ in batch)
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        weights = np.repeat([n for _, n in batch], [len(line) for line, _ in batch])
        totals += np.bincount(codes, weights, minlength=len(totals)).astype(np.int64)
    order = np.argsort(-totals, kind="stable")
    before = np.cumsum(totals[order]) - totals[order]  # of all more frequent characters
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
    """The texts of all symbols, and what decides whether two of them may merge."""

    def __init__(self, proto: Any, admits: Callable[[str], bool]) -> None:
        normal = [piece.type == piece.NORMAL for piece in proto.pieces]
        self.texts = [piece.piece for piece in proto.pieces]
        self.length = np.array([len(text) for text in self.texts], dtype=np.int32)
        self.admitted = np.array(
            [ok and admits(t) for t, ok in zip(self.texts, normal, strict=True)]
        )
        self.has_space = np.array([SPACE in text for text in self.texts])
        self.mergeable = np.array(
            [
                ok and not any(c.isdigit() for c in t)
                for t, ok in zip(self.texts, normal, strict=True)
            ]
        )

    def add(self, text: str) -> int:
        """A symbol for a new, admitted piece."""
        index = len(self.texts)
        self.texts.append(text)
        if index == len(self.length):  # grow by doubling
            spare = np.zeros(index, dtype=np.int32)
            self.length = np.concatenate([self.length, spare])
            self.admitted = np.concatenate([self.admitted, spare > 0])
        self.length[index] = len(text)
        self.admitted[index] = True
        return index


@dataclass(frozen=True)
class _Segments:
    symbols: NDArray[np.int32]  # END after every segment
    weights: Ints  # of each symbol: how often its segment occurs


def _segments(proto: Any, lines: Counter[str], symbols: _Symbols, num_threads: int) -> _Segments:
    """The stretches of base tokens inside which new pieces can form, each once, with its count.

    A token that never merges (bytes, digits) ends one, a space begins one, and those without an
    admitted character or with a single token are left out.
    """
    # The dummy prefix stands only at the start of a whole document.
    encoder = make_processor(proto, dummy_prefix=False)
    counts: Counter[bytes] = Counter()
    for batch in _batches(lines):
        encoded = encoder.encode([line for line, _ in batch], num_threads=num_threads)
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
    return _Segments(flat, np.repeat(np.array(list(counts.values()), dtype=np.int32), sizes))


class _State:
    """The text as linked symbols, and for every pair its count and where it may stand."""

    def __init__(
        self, segments: _Segments, symbols: _Symbols, max_piece_length: int, min_occurrences: int
    ) -> None:
        self.symbols = symbols
        self.max_piece_length = max_piece_length
        self.min_occurrences = min_occurrences
        self.text = segments.symbols
        self.weights = segments.weights
        size = len(self.text)
        self.following = np.arange(1, size + 1, dtype=np.int32)
        self.preceding = np.arange(-1, size - 1, dtype=np.int32)
        self.is_left = np.zeros(size, dtype=bool)  # scratch: the left halves of the merge at hand
        self.counts: dict[int, int] = {}
        # Positions of left halves; some may have changed since, so they are checked when used.
        self.positions: dict[int, list[Ints]] = {}
        self.queue: list[tuple[int, int]] = []
        self._add_pairs(np.flatnonzero(self.text[:-1] >= 0).astype(np.int32))

    def merge(self) -> Iterator[str]:
        """Merge the most frequent pair, again and again; yields each new piece.

        A piece has one pair only: wherever its text stands by itself, it is cut in the same way.
        """
        while self.queue:
            negative, pair = heapq.heappop(self.queue)
            count = self.counts.get(pair, 0)
            if count != -negative:  # some occurrences have been taken by other merges
                if count >= self.min_occurrences:
                    heapq.heappush(self.queue, (-count, pair))
                continue
            text = self._text_of(pair)
            self._merge_pair(pair, self.symbols.add(text))
            yield text

    def _text_of(self, pair: int) -> str:
        left, right = pair >> RIGHT_BITS, pair & (2**RIGHT_BITS - 1)
        return self.symbols.texts[left] + self.symbols.texts[right]

    def _add_pairs(self, left_at: Ints) -> None:
        """Count the pairs whose left symbols stand at these positions, and index them."""
        left = self.text[left_at].astype(np.int64)
        right_at = self.following[left_at]
        right = self.text[right_at].astype(np.int64)
        known = self.symbols
        allowed = (right >= 0) & (known.admitted[left] | known.admitted[right])
        allowed &= known.length[left] + known.length[right] <= self.max_piece_length
        if not allowed.any():
            return
        left_at = left_at[allowed]
        pairs = left[allowed] << RIGHT_BITS | right[allowed]
        order, starts, groups, totals = _grouped(pairs, self.weights[left_at])
        sorted_at = left_at[order]
        ends = np.append(starts[1:], len(order))
        for group in np.flatnonzero(totals >= self.min_occurrences).tolist():
            pair, total = int(groups[group]), int(totals[group])
            places = sorted_at[starts[group] : ends[group]]
            self.counts[pair] = self.counts.get(pair, 0) + total
            self.positions.setdefault(pair, []).append(places)
            heapq.heappush(self.queue, (-self.counts[pair], pair))

    def _remove_pairs(self, left_at: Ints) -> None:
        """The pairs whose left symbols stand here are about to disappear: count them less."""
        pairs = self.text[left_at].astype(np.int64) << RIGHT_BITS
        pairs |= self.text[self.following[left_at]].astype(np.int64)
        _, _, groups, totals = _grouped(pairs, self.weights[left_at])
        for pair, total in zip(groups.tolist(), totals.tolist(), strict=True):
            if pair in self.counts:
                self.counts[pair] -= total

    def _merge_pair(self, pair: int, index: int) -> None:
        """Put the symbol `index` in the place of every occurrence of the pair."""
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
        # Pairs with the neighbours. A neighbour that is a half of another occurrence is counted
        # once: as what follows the one on the left.
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
        """Of x x x only the first two merge, as in the tokenizer: from left to right."""
        kept, taken = [], END
        for position in at.tolist():
            if position != taken:
                kept.append(position)
                taken = int(self.following[position])
        return np.array(kept, dtype=np.int32)


def _grouped(pairs: Ints, weights: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """The order that sorts the pairs, where each distinct one then starts, which it is, and its
    summed weight."""
    order = np.argsort(pairs, kind="stable")
    if not len(pairs):
        return order, order, pairs, weights
    pairs = pairs[order]
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    return order, starts, pairs[starts], np.add.reduceat(weights[order], starts, dtype=np.int64)
