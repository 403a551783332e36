"""Tokenizing a corpus: sentencepiece's ids, with each distinct stretch of text encoded once.

BPE joins neighboring characters into pieces. If no piece contains two characters side by side, no
merge can cross between them. A text is cut at all such places into stretches that are encoded
independently:

    stretches   ▁私 は ▁LibreOffice を 使って い ます 。        cut wherever no piece holds the two
    ids         one lookup each: most stretches have occurred before

The result is exact, ties included, because merges on the two sides of a cut do not affect each
other. Numpy does the work on characters for a whole batch of texts, and sentencepiece encodes only
new stretches.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.errors import DataError

CODE_POINTS = 0x110000
SPACE = ord(" ")
# Size of the table of pairs. A hash collision only misses a cut, which costs time, not exactness.
PAIR_BITS = 24
# The cache is cleared when it holds more stretches, which take about 100 MB: text keeps bringing
# new names and numbers.
MAX_CACHED = 2**19


class CorpusTokenizer:
    """A tokenizer for batches of texts, with the ids of `SentencePieceProcessor.encode`.

    `proto` is a ModelProto of ChatGLM3's kind: BPE with byte fallback, without normalization.
    Raises DataError for another one.
    """

    # The cache: a row is a stretch's ids, with their start in `_ids` and their number.
    _starts: np.ndarray
    _lengths: np.ndarray
    _ids: np.ndarray

    def __init__(self, proto: Any) -> None:
        if not tokenizer.is_lossless(proto):
            raise DataError(
                "the tokenizer normalizes text or has no byte fallback: expected one from step 2"
            )
        self._processor = tokenizer.make_processor(proto, dummy_prefix=False)
        longer = [
            piece.piece.replace(tokenizer.SPACE, " ")
            for piece in proto.pieces
            if len(piece.piece) > 1 and piece.type not in (piece.CONTROL, piece.UNKNOWN, piece.BYTE)
        ]
        codes = _code_points("".join(longer))
        characters = np.unique(codes)
        # Characters of longer pieces are numbered from 1; all others are 0.
        self._number = np.zeros(CODE_POINTS, dtype=np.int32)
        self._number[characters] = np.arange(1, len(characters) + 1)
        self._number[ord(tokenizer.SPACE)] = self._number[SPACE]
        self._bits = (len(characters) + 1).bit_length()
        # Characters whose numbers fit into a key of 63 bits.
        self._key_characters = 63 // self._bits
        is_inside = np.ones(len(codes), dtype=bool)
        is_inside[np.cumsum([len(text) for text in longer]) - 1] = False
        self._joined = np.zeros(2**PAIR_BITS, dtype=bool)
        self._joined[self._pairs(self._number[codes])[is_inside[:-1]]] = True
        self._clear()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32."""
        if not texts:
            return []
        if len(self._starts) > MAX_CACHED:
            self._clear()
        joined = "".join([" " + text if text else "" for text in texts])
        codes = _code_points(joined)
        sizes = np.array([len(text) + 1 if text else 0 for text in texts])
        ends = np.cumsum(sizes)
        numbers = self._number.take(codes)
        is_last = np.ones(len(codes), dtype=bool)
        if len(codes):
            are_joined = self._joined.take(self._pairs(numbers))
            are_joined &= (numbers[:-1] > 0) & (numbers[1:] > 0)
            np.logical_not(are_joined, out=is_last[:-1])
            is_last[ends[sizes > 0] - 1] = True
        bounds = np.concatenate([[0], np.flatnonzero(is_last) + 1])
        rows = self._rows(joined, codes, numbers, bounds)
        lengths = self._lengths.take(rows)
        after = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self._starts.take(rows) - after[:-1], lengths)
        places += np.arange(after[-1])
        ids = self._ids.take(places)
        return np.split(ids, after[np.searchsorted(bounds, ends)][:-1])

    def _pairs(self, numbers: np.ndarray) -> np.ndarray:
        """Return every pair's place in the table; unique for up to 4,095 numbered characters."""
        half = PAIR_BITS // 2
        return ((numbers[:-1] << half) + numbers[1:]) & (2**PAIR_BITS - 1)

    def _rows(
        self, joined: str, codes: np.ndarray, numbers: np.ndarray, bounds: np.ndarray
    ) -> np.ndarray:
        """Return each stretch's cache row; by character, by key, or by text, as its size allows."""
        starts, ends = bounds[:-1], bounds[1:]
        sizes = ends - starts
        rows = np.empty(len(sizes), dtype=np.int64)

        def cut(stretches: np.ndarray) -> list[str]:
            spans = zip(starts[stretches].tolist(), ends[stretches].tolist(), strict=True)
            return [joined[start:end] for start, end in spans]

        one = np.flatnonzero(sizes == 1)
        characters = codes[starts[one]]
        new = np.unique(characters[self._row_of_character.take(characters) < 0])
        self._row_of_character[new] = self._add([chr(code) for code in new.tolist()])
        rows[one] = self._row_of_character.take(characters)

        # The key of a short stretch holds the numbers of its characters side by side.
        short = np.flatnonzero((sizes > 1) & (sizes <= self._key_characters))
        keys = np.zeros(len(short), dtype=np.int64)
        for offset in range(self._key_characters):
            inside = np.flatnonzero(sizes[short] > offset)
            part = numbers.take(starts[short[inside]] + offset).astype(np.int64)
            keys[inside] |= part << (self._bits * offset)
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        names = unique.tolist()
        key_rows = np.array([self._row_of_key.get(name, -1) for name in names], dtype=np.int64)
        new = np.flatnonzero(key_rows < 0)
        key_rows[new] = self._add(cut(short[first[new]]))
        self._row_of_key.update((names[place], int(key_rows[place])) for place in new)
        rows[short] = key_rows[inverse]

        long = np.flatnonzero(sizes > self._key_characters)
        texts = cut(long)
        unknown = [text for text in dict.fromkeys(texts) if text not in self._row_of_text]
        self._row_of_text.update(zip(unknown, self._add(unknown).tolist(), strict=True))
        rows[long] = [self._row_of_text[text] for text in texts]
        return rows

    def _add(self, stretches: Sequence[str]) -> np.ndarray:
        """Encode new stretches and return their cache rows."""
        rows = len(self._starts) + np.arange(len(stretches))
        if stretches:
            # For a few tokens, lists are twice as fast as sentencepiece's numpy arrays.
            encoded = self._processor.encode(list(stretches), num_threads=1)
            lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
            end = len(self._ids)
            self._starts = np.concatenate([self._starts, end + np.cumsum(lengths) - lengths])
            self._lengths = np.concatenate([self._lengths, lengths])
            ids = np.array(list(itertools.chain.from_iterable(encoded)), dtype=np.int32)
            self._ids = np.concatenate([self._ids, ids])
        return rows

    def _clear(self) -> None:
        self._row_of_key: dict[int, int] = {}
        self._row_of_text: dict[str, int] = {}
        self._row_of_character = np.full(CODE_POINTS, -1, dtype=np.int64)
        self._starts = np.zeros(0, dtype=np.int64)
        self._lengths = np.zeros(0, dtype=np.int64)
        self._ids = np.zeros(0, dtype=np.int32)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
