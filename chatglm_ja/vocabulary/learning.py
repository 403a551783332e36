"""Step 1: learning Japanese pieces, by sentencepiece or by continuing the base's own merges.

A vocabulary learned from characters ignores the merges that the base does first. Many of its pieces
can then never be produced: the base has merged 情報 before 報を could form. Continued BPE
(arXiv:2512.03989) starts where the base's merges end. The base tokenizer segments the text, and the
most frequent pair of adjacent tokens becomes the next piece, again and again:

    characters   情 報 を 表 示 し ま す
    base         情報 を 表示 し ま す          the base's merges, which always come first
    learned      情報 を 表示 します            しま, then します; later 表示します ...

Only pairs that make a piece the policy admits are counted, so step 2 drops none of the pieces.
After n pieces the training text is segmented exactly as by the merged tokenizer with these n
pieces, and every piece is reachable. Pieces are of characters or, in byte-level BPE, of bytes:
with them こ and れ begin as E3 81 | 93 and E3 82 | 8C, which merge like anything else.

This is classic BPE with an index of the pairs (Sennrich et al., arXiv:1508.07909). All occurrences
of a pair are merged at once in numpy. The text is one array of symbols, linked so that a merge
removes a symbol in constant time:

    symbols    情報 を 表示 し ま す -1 ...    -1 ends a segment; a repeated segment is stored once
    following   1   2   3   4  5  6            with its count as weight
"""

import functools
import heapq
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from tqdm.auto import tqdm

from chatglm_ja.bases.interface import Vocabulary
from chatglm_ja.bases.sentencepiece_vocabulary import LEARNED_FILE
from chatglm_ja.chatglm3.tokenizer import parse_proto
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary.settings import TrainTokenizerConfig

Ints = NDArray[np.integer]

MIN_OCCURRENCES = 2  # of a pair that becomes a piece
END, MERGED = -1, -2  # instead of a symbol: the end of a segment, the right half of a merge
RIGHT_BITS = 32  # a pair is one integer: left symbol << 32 | right symbol
BATCH_LINES = 20_000
CONTINUATION = tuple(bytes([byte]) for byte in range(0x80, 0xC0))  # later bytes of a character


def train_sentencepiece(lines: Iterable[str], config: TrainTokenizerConfig) -> Any:
    """Train a sentencepiece BPE model (ModelProto) from characters, on lines of text.

    The result depends on the lines and the settings only, not on the number of threads. Raises
    DataError, with sentencepiece's reason, if the text does not give `vocab_size` pieces.
    """
    failure: list[BaseException] = []

    def guarded() -> Iterable[str]:
        """Keep an exception of `lines`, which sentencepiece replaces with one of its own."""
        try:
            yield from lines
        except BaseException as error:
            failure.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            num_threads=config.num_threads,
            max_sentence_length=2**30,  # sentencepiece silently drops longer lines
            minloglevel=2,
            **config.trainer_settings(),
        )
    except RuntimeError as error:
        if failure:
            raise failure[0] from None
        reason = str(error).splitlines()[-1].strip().rpartition("] ")[2]
        raise DataError(
            f"sentencepiece could not learn {config.vocab_size} pieces from this text ({reason}): "
            "change --vocab-size or give more text"
        ) from None
    proto = parse_proto(model.getvalue(), Path(LEARNED_FILE))
    proto.trainer_spec.ClearField("num_threads")
    return proto


def continue_merges(
    base: Vocabulary, lines: Iterable[str], config: TrainTokenizerConfig
) -> tuple[list[tuple[str, str]], list[str]]:
    """Learn pieces that continue the merges of `base`: merges and characters, as `learn_pieces`.

    They are `vocab_size` together with the entries that sentencepiece's file reserves. Raises
    DataError if the text does not give so many.
    """
    count = config.vocab_size - base.reserved
    if count < 1:
        raise DataError(
            f"--vocab-size {config.vocab_size} leaves no piece to learn: {base.reserved} are "
            "control and byte pieces"
        )
    merges, characters = learn_pieces(base, Counter(lines), count, config)
    size = base.reserved + len(merges) + len(characters)
    if size < config.vocab_size:
        raise DataError(
            f"this text gives {size} pieces, expected {config.vocab_size}: lower "
            "--vocab-size or give more text"
        )
    return merges, characters


def learn_pieces(
    base: Vocabulary, lines: Counter[str], count: int, config: TrainTokenizerConfig
) -> tuple[list[tuple[str, str]], list[str]]:
    """Learn up to `count` pieces by continued BPE.

    `lines` maps each line of text to its count. Returns the pairs of pieces that merge, in the
    order learned, and the characters that the base has no piece for, among the most frequent
    `character_coverage` of the text. The policy admits all of them. Like the base's, pieces have at
    most `max_piece_length` characters, no digit, and a space only at the start. There are fewer
    than `count` if no remaining pair occurs MIN_OCCURRENCES times.
    """
    admits = config.policy.admits
    characters = base.find_missing(_frequent_characters(lines, config.character_coverage))
    characters = [c for c in characters if admits(c)]
    characters = [c for c in characters if not (c.isdigit() or c.isspace())][:count]
    with_characters = base.extend(characters)
    remaining = count - len(characters)
    symbols = _Symbols(with_characters, admits, remaining)
    text, weights = _segments(with_characters, lines, symbols, config.num_threads)
    state = _State(text, weights, symbols, config.max_piece_length)
    merges = itertools.islice(state.merge(), remaining)
    return list(tqdm(merges, "learning", remaining, unit=" pieces")), characters


def _frequent_characters(lines: Counter[str], coverage: float) -> list[str]:
    """Return the most frequent characters, which make up the share `coverage` of the text."""
    totals = np.zeros(0x110000, dtype=np.int64)
    for batch in _batches(lines):
        text = "".join(line for line, _ in batch)
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        weights = np.repeat([n for _, n in batch], [len(line) for line, _ in batch])
        totals += np.bincount(codes, weights, minlength=len(totals)).astype(np.int64)
    order = np.argsort(-totals, kind="stable")
    before = np.cumsum(totals[order]) - totals[order]  # count of all more frequent characters
    covered = order[(before < coverage * totals.sum()) & (totals[order] > 0)]
    return list(map(chr, covered.tolist()))


def _batches(lines: Counter[str]) -> Iterator[list[tuple[str, int]]]:
    items = iter(lines.items())
    while batch := list(itertools.islice(items, BATCH_LINES)):
        yield batch


class _Symbols:
    """The pieces of all symbols, and the properties that decide whether two of them may merge.

    length       the characters that a piece has a part of
    begun        the characters that begin in it: all but one that it has only the end of
    admitted     whether the policy admits it, and so every piece that it is a part of
    mergeable    whether it may be a part of a new piece
    """

    def __init__(
        self, vocabulary: Vocabulary, admits: Callable[[str | bytes], bool], spare: int
    ) -> None:
        """Take the pieces of a vocabulary, and reserve space for `spare` new ones."""
        self.vocabulary, self.admits = vocabulary, admits
        self.pieces = [piece or "" for piece in vocabulary.pieces]
        contents = [vocabulary.content_of(piece) for piece in self.pieces]
        lengths = np.array([*map(_count_characters, contents), *[(0, 0)] * spare], dtype=np.int32)
        self.length, self.begun = lengths.T.copy()
        normal = np.array([piece is not None for piece in vocabulary.pieces])
        self.admitted = np.append(normal & [*map(admits, contents)], np.ones(spare, dtype=bool))
        self.mergeable = normal & ~np.array([*map(_has_digit, contents)])

    @property
    def completing(self) -> NDArray[np.bool_]:
        """Whether a piece begins inside a character, which the piece on its left then has begun.

        The two may be admitted together though neither is: their character may be.
        """
        return self.length > self.begun

    def may_join(self, left: int, right: int) -> bool:
        """Return whether the piece of two symbols is admitted, and has no digit."""
        content = self.vocabulary.content_of(self.pieces[left] + self.pieces[right])
        return self.admits(content) and not _has_digit(content)

    def add(self, piece: str) -> int:
        """Add a symbol for a new, admitted piece and return its number."""
        number = len(self.pieces)
        lengths = _count_characters(self.vocabulary.content_of(piece))
        self.length[number], self.begun[number] = lengths
        self.pieces.append(piece)
        return number


def _count_characters(content: str | bytes) -> tuple[int, int]:
    """Return how many characters a piece has a part of, and how many of them begin in it."""
    if isinstance(content, str):
        return len(content), len(content)
    begun = sum(byte & 0xC0 != 0x80 for byte in content)  # all but continuation bytes of UTF-8
    return begun + (content[:1] in CONTINUATION), begun


def _has_digit(content: str | bytes) -> bool:
    text = content if isinstance(content, str) else content.decode(errors="ignore")
    return any(map(str.isdigit, text))


def _segments(
    vocabulary: Vocabulary, lines: Counter[str], symbols: _Symbols, num_threads: int
) -> tuple[NDArray[np.int32], Ints]:
    """Tokenize the lines and split them into segments inside which new pieces can form.

    A segment is a stretch of `Vocabulary.split`, and also ends before and after a token that never
    merges (bytes of a character without a piece, digits). Segments that cannot give an admitted
    piece, or have a single token, are dropped. Returns the symbols of all distinct segments, END
    after each, and for every symbol the count of its segment.
    """
    counts: Counter[bytes] = Counter()
    may_give_piece = symbols.admitted | symbols.completing
    for batch in _batches(lines):
        flat, sizes, begins = vocabulary.split([line for line, _ in batch], num_threads)
        if not len(flat):
            continue
        weights = np.repeat([n for _, n in batch], sizes)
        starts_line = np.zeros(len(flat) + 1, dtype=bool)
        starts_line[np.concatenate([[0], np.cumsum(sizes)])] = True
        fixed = ~symbols.mergeable[flat]
        begins = starts_line[:-1] | fixed | begins
        begins[1:] |= fixed[:-1]
        starts = np.flatnonzero(begins)
        ends = np.append(starts[1:], len(flat))
        useful = np.logical_or.reduceat(may_give_piece[flat], starts) & (ends - starts > 1)
        for start, end in zip(starts[useful].tolist(), ends[useful].tolist(), strict=True):
            counts[flat[start:end].tobytes()] += int(weights[start])
    end_mark = np.array([END], dtype=np.int32).tobytes()
    flat = np.frombuffer(b"".join(key + end_mark for key in counts), dtype=np.int32).copy()
    sizes = np.array([len(key) // 4 + 1 for key in counts], dtype=np.int64)
    return flat, np.repeat(np.array(list(counts.values()), dtype=np.int32), sizes)


class _State:
    """The text as linked symbols, and for every pair its count and candidate positions."""

    def __init__(
        self, text: NDArray[np.int32], weights: Ints, symbols: _Symbols, max_piece_length: int
    ) -> None:
        self.text, self.weights, self.symbols = text, weights, symbols
        self.max_piece_length = max_piece_length
        size = len(text)
        self.following = np.arange(1, size + 1, dtype=np.int32)
        self.preceding = np.arange(-1, size - 1, dtype=np.int32)
        self.is_left = np.zeros(size, dtype=bool)  # scratch: left halves of the current merge
        self.counts: dict[int, int] = {}
        # Positions of left halves. Other merges may have changed them, so they are checked on use.
        self.positions: dict[int, list[Ints]] = {}
        self.queue: list[tuple[int, int]] = []
        self._may_join = functools.cache(lambda pair: symbols.may_join(*_split_pair(pair)))
        self._add_pairs(np.flatnonzero(self.text[:-1] >= 0).astype(np.int32))

    def merge(self) -> Iterator[tuple[str, str]]:
        """Merge the most frequent pair, again and again; yield the two pieces.

        A piece is made by one pair only, since its text is segmented in the same way everywhere.
        The exception is a piece that the base makes of whole stretches, without merges: then the
        pair is passed over.
        """
        while self.queue:
            negative, pair = heapq.heappop(self.queue)
            count = self.counts.get(pair, 0)
            if count != -negative:  # other merges took some of its occurrences
                if count >= MIN_OCCURRENCES:
                    heapq.heappush(self.queue, (-count, pair))
                continue
            left_piece, right_piece = (self.symbols.pieces[half] for half in _split_pair(pair))
            if left_piece + right_piece in self.symbols.vocabulary:
                continue
            self._merge_pair(pair, self.symbols.add(left_piece + right_piece))
            yield left_piece, right_piece

    def _add_pairs(self, left_at: Ints) -> None:
        """Count and index the pairs whose left symbols are at these positions."""
        left = self.text[left_at].astype(np.int64)
        right_at = self.following[left_at]
        right = self.text[right_at].astype(np.int64)
        symbols = self.symbols
        is_admitted = symbols.admitted[left] | symbols.admitted[right]
        is_completed = symbols.length[right] > symbols.begun[right]
        allowed = (right >= 0) & (is_admitted | is_completed)
        allowed &= symbols.length[left] + symbols.begun[right] <= self.max_piece_length
        if not allowed.any():
            return
        left_at = left_at[allowed]
        pairs = left[allowed] << RIGHT_BITS | right[allowed]
        order, starts, groups, totals = _grouped(pairs, self.weights[left_at])
        sorted_at = left_at[order]
        ends = np.append(starts[1:], len(order))
        is_completed = is_completed[allowed][order[starts]]
        for group in np.flatnonzero(totals >= MIN_OCCURRENCES).tolist():
            pair, total = int(groups[group]), int(totals[group])
            if is_completed[group] and not self._may_join(pair):
                continue
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
        left, right = _split_pair(pair)
        at = at[self.text[at] == left]
        at = at[self.text[self.following[at]] == right]
        if left == right:  # of overlapping pairs the first merges, as in the tokenizer
            positions, right_half = [], END
            for position in at.tolist():
                if position != right_half:
                    positions.append(position)
                    right_half = int(self.following[position])
            at = np.array(positions, dtype=np.int32)
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


def _split_pair(pair: int) -> tuple[int, int]:
    return pair >> RIGHT_BITS, pair & (2**RIGHT_BITS - 1)


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
