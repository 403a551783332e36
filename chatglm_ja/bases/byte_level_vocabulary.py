"""Byte-level BPE as a vocabulary to extend: pieces of bytes in a tokenizer.json (GPT-2's kind).

Each byte is written as one printable character, and the pre-tokenizer cuts a text into stretches
that no merge crosses:

    text         ファイル を
    bytes        E3 83 95 E3 82 A1 ...            written ãĥķãĤ¡ãĤ¤ãĥ« ...
    base         ãĥķ ãĤ¡ ãĤ ¤ ãĥ«                 some characters are several pieces
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chatglm_ja.bases.interface import Vocabulary
from chatglm_ja.bases.tokenizer_json import (
    Backend,
    BaseTokenizer,
    append_pieces_to_json,
    count_ids,
    read_added_tokens,
)
from chatglm_ja.errors import DataError

LEARNED_FILE = "ja_merges.txt"
HEADER = "#version: 0.2"  # of GPT-2's merges.txt

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def is_bytes(piece: str) -> bool:
    """Return whether a piece is written in the characters that stand for bytes."""
    return _BYTES.keys() >= set(piece)


def read_bytes(piece: str) -> bytes:
    """Return the bytes that a piece is written for."""
    return bytes(_BYTES[character] for character in piece)


class ByteLevelVocabulary(Vocabulary):
    """The pieces of a byte-level BPE tokenizer; `backend` is its tokenizer.json."""

    in_bytes = True
    reserved = 0

    def __init__(self, base: BaseTokenizer, backend: Backend | None = None) -> None:
        """Take the base's tokenizer, and a tokenizer.json if it is another than the base's."""
        self.base = base
        self.backend = base.backend if backend is None else backend
        self.size = count_ids(self.backend)
        added = read_added_tokens(self.backend)
        self.special_tokens = list(added)
        model = self.backend["model"]
        # tokenizers writes merges as pairs, of whatever form they were read.
        self._ranks = {(left, right): i for i, (left, right) in enumerate(model["merges"])}
        self._names = added.keys() | model["vocab"]
        not_made = added.keys() - {left + right for left, right in self._ranks}
        self.pieces: list[str | None] = [None] * self.size
        for piece, index in model["vocab"].items():
            if is_bytes(piece) and piece not in not_made:
                self.pieces[index] = piece
        # What the pieces alone make of a text: no added tokens, no space before the text.
        plain = {
            **self.backend,
            "added_tokens": [],
            "post_processor": None,
            "pre_tokenizer": _without_prefix_space(self.backend["pre_tokenizer"]),
        }
        self._plain = Tokenizer.from_str(json.dumps(plain))

    def __contains__(self, piece: str) -> bool:
        return piece in self._names

    def content_of(self, piece: str) -> bytes:
        return read_bytes(piece)

    def content_of_text(self, text: str) -> bytes:
        normalizer = self._plain.normalizer
        return (normalizer.normalize_str(text) if normalizer else text).encode()

    def find_missing(self, characters: Iterable[str]) -> list[str]:
        return []

    def split(self, lines: Sequence[str], num_threads: int) -> tuple[np.ndarray, ...]:
        encodings = self._plain.encode_batch(list(lines), add_special_tokens=False)
        sizes = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        count = int(sizes.sum())
        tokens = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        ids = np.fromiter(tokens, dtype=np.int32, count=count)
        numbers = itertools.chain.from_iterable(encoding.word_ids for encoding in encodings)
        stretches = np.fromiter(numbers, dtype=np.int32, count=count)
        return ids, sizes, np.diff(stretches, prepend=-1) != 0

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        for text in texts:
            yield self._plain.encode(text, add_special_tokens=False).ids

    def segment(self, pieces: Sequence[str]) -> list[list[str]]:
        # With `ignore_merges`, a stretch that is a piece needs no merges, and every piece would be.
        model = {**self.backend["model"], "ignore_merges": False}
        merging = Tokenizer.from_str(json.dumps({**self.backend, "model": model})).model
        return [[token.value for token in merging.tokenize(piece)] for piece in pieces]

    def merge_rank(self, left: str, right: str) -> float:
        return self._ranks.get((left, right), math.inf)

    def extend(self, pieces: Sequence[str]) -> "ByteLevelVocabulary":
        backend = append_pieces_to_json(self.backend, self.pieces, pieces)
        return ByteLevelVocabulary(self.base, backend)

    def save(self, folder: Path) -> None:
        self.base.save(self.backend, folder)

    def make_line_encoder(self) -> None:
        return None

    def save_learned(
        self, merges: Sequence[tuple[str, str]], characters: Sequence[str], folder: Path
    ) -> None:
        """Write GPT-2's merges format, and ja_bpe.vocab for reading: pieces as text, and ranks."""
        lines = [HEADER, *map(" ".join, merges)]
        (folder / LEARNED_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        pieces = [self.content_of("".join(pair)) for pair in merges]
        vocab = [
            f"{piece.decode('utf-8', 'backslashreplace')}\t{rank}\n"
            for rank, piece in enumerate(pieces)
        ]
        (folder / "ja_bpe.vocab").write_text("".join(vocab), encoding="utf-8")

    def read_learned(self, path: Path) -> list[str]:
        path = path / LEARNED_FILE if path.is_dir() else path
        expected = (
            "expected merges of bytes, as GPT-2's merges.txt: for this base, pass --method "
            "continue to step1_train_tokenizer.py"
        )
        try:
            header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except FileNotFoundError:
            raise DataError(f"{path} not found: {expected}") from None
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8: {expected}") from None
        if not header.startswith("#version"):
            raise DataError(f"{path} begins with {header[:20]!r}, not {HEADER!r}: {expected}")
        pairs = [line.split(" ") for line in lines]
        for number, pair in enumerate(pairs, start=2):
            if len(pair) != 2 or not all(pair) or not is_bytes("".join(pair)):
                raise DataError(f"{path} line {number} is {' '.join(pair)[:40]!r}: {expected}")
        pieces = list(map("".join, pairs))
        if len(set(pieces)) < len(pieces):
            repeated = next(piece for piece in pieces if pieces.count(piece) > 1)
            raise DataError(f"{path} makes the piece {repeated!r} twice: {expected}")
        return pieces


def _without_prefix_space(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return the pre-tokenizer without the space that it puts before a whole text."""
    if "pretokenizers" in pre_tokenizer:
        parts = [_without_prefix_space(part) for part in pre_tokenizer["pretokenizers"]]
        return {**pre_tokenizer, "pretokenizers": parts}
    if "add_prefix_space" in pre_tokenizer:
        return {**pre_tokenizer, "add_prefix_space": False}
    return pre_tokenizer
