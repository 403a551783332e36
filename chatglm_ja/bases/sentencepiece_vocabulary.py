"""sentencepiece BPE as a vocabulary to extend: pieces of characters in a ModelProto.

Any two neighbors merge whose concatenation is a piece. A piece's score is the negative rank of its
merge, and new pieces score below all others. Characters without a piece are spelled in bytes, which
never merge, so new ones need pieces of their own.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja.bases.interface import Vocabulary
from chatglm_ja.bases.tokenizer_json import (
    BaseTokenizer,
    append_pieces_to_json,
    count_ids,
    read_added_tokens,
)
from chatglm_ja.chatglm3.base_config import MODEL_FILE
from chatglm_ja.chatglm3.tokenizer import (
    SPACE,
    SPECIAL_TOKENS,
    add_special_tokens,
    append_pieces,
    encode_texts,
    make_processor,
    read_proto,
)
from chatglm_ja.chatglm3.tokenizer_files import make_line_encoder, save_tokenizer
from chatglm_ja.errors import DataError

LEARNED_FILE = "ja_bpe.model"


class SentencePieceVocabulary(Vocabulary):
    """The pieces of a ModelProto, in whose order `pieces` and ids are numbered."""

    in_bytes = False

    def __init__(self, proto: Any, size: int, special_tokens: Sequence[str]) -> None:
        self.proto, self.size = proto, size
        self.special_tokens = special_tokens
        self.pieces = [p.piece if p.type == p.NORMAL else None for p in proto.pieces]
        self.reserved = len(self._reserved_pieces())
        self._scores = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
        self._names = {piece.piece for piece in proto.pieces}.union(self.special_tokens)

    def _reserved_pieces(self) -> list[Any]:
        """Return the control and byte pieces, without which a ModelProto does not load."""
        normal = self.proto.SentencePiece.NORMAL
        return [
            piece
            for piece in self.proto.pieces
            if piece.type != normal and piece.piece not in SPECIAL_TOKENS
        ]

    def __contains__(self, piece: str) -> bool:
        return piece in self._names

    def content_of(self, piece: str) -> str:
        return piece

    def content_of_text(self, text: str) -> str:
        return text

    def find_missing(self, characters: Iterable[str]) -> list[str]:
        return [character for character in characters if character not in self._names]

    def split(self, lines: Sequence[str], num_threads: int) -> tuple[np.ndarray, ...]:
        # Only the start of a whole document has the dummy prefix.
        processor = make_processor(self.proto, dummy_prefix=False)
        encoded = processor.encode(list(lines), num_threads=num_threads)
        sizes = np.array([len(ids) for ids in encoded], dtype=np.int64)
        tokens = itertools.chain.from_iterable(encoded)
        ids = np.fromiter(tokens, dtype=np.int32, count=int(sizes.sum()))
        has_space = np.array([SPACE in (piece or "") for piece in self.pieces])
        return ids, sizes, has_space[ids]

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        processor = make_processor(self.proto)
        yield from encode_texts(processor, texts, num_threads=1)

    def segment(self, pieces: Sequence[str]) -> list[list[str]]:
        processor = make_processor(self.proto, dummy_prefix=False)
        # sentencepiece reads its symbol for a space as a space.
        return list(processor.encode(list(pieces), out_type=str))

    def merge_rank(self, left: str, right: str) -> float:
        return -self._scores.get(left + right, -math.inf)

    def save_learned(
        self, merges: Sequence[tuple[str, str]], characters: Sequence[str], folder: Path
    ) -> None:
        proto = copy.deepcopy(self.proto)
        del proto.pieces[:]
        proto.pieces.extend(self._reserved_pieces())
        for rank, piece in enumerate([*map("".join, merges), *characters]):
            proto.pieces.add(piece=piece, score=-rank, type=proto.SentencePiece.NORMAL)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        save_model(proto, folder)

    def read_learned(self, path: Path) -> list[str]:
        proto = read_proto(path / LEARNED_FILE if path.is_dir() else path)
        return [piece.piece for piece in proto.pieces if piece.type == piece.NORMAL]


def save_model(proto: Any, folder: Path) -> None:
    """Write ja_bpe.model, and ja_bpe.vocab for reading: a line of piece and score for each."""
    (folder / LEARNED_FILE).write_bytes(proto.SerializeToString())
    vocab = "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in proto.pieces)
    (folder / "ja_bpe.vocab").write_text(vocab, encoding="utf-8")


class ChatGLM3Vocabulary(SentencePieceVocabulary):
    """ChatGLM3's pieces, and its nine special tokens as pieces that no text produces."""

    def __init__(self, proto: Any) -> None:
        proto = add_special_tokens(proto)
        super().__init__(proto, len(proto.pieces), SPECIAL_TOKENS)

    def extend(self, pieces: Sequence[str]) -> "ChatGLM3Vocabulary":
        return ChatGLM3Vocabulary(append_pieces(self.proto, pieces))

    def save(self, folder: Path) -> None:
        save_tokenizer(self.proto, folder)

    def make_line_encoder(self) -> Callable[[Sequence[str]], list[list[int]]]:
        return make_line_encoder(self.proto)


class LlamaVocabulary(SentencePieceVocabulary):
    """The pieces of tokenizer.model beside a tokenizer.json, which has added tokens as well.

    New pieces are chosen by the former and saved in the latter, so their ids there are others.
    """

    def __init__(self, base: BaseTokenizer, proto: Any, new_pieces: Sequence[str] = ()) -> None:
        """Take the base's tokenizer, and its ModelProto with new pieces after the base's."""
        self.base, self.new_pieces = base, new_pieces
        backend = base.backend
        size = count_ids(backend) + len(new_pieces)
        super().__init__(proto, size, list(read_added_tokens(backend)))

    @classmethod
    def open(cls, base: BaseTokenizer, folder: Path) -> "LlamaVocabulary":
        """Read the tokenizer.model of a base's folder.

        Raises DataError if it is missing, loses text, or has other ids than the tokenizer.
        """
        path = folder / MODEL_FILE
        proto = read_proto(path)
        spec = proto.normalizer_spec
        if (
            spec.precompiled_charsmap
            or spec.remove_extra_whitespaces
            or not spec.escape_whitespaces
            or proto.trainer_spec.treat_whitespace_as_suffix
            or not proto.trainer_spec.byte_fallback
        ):
            raise DataError(
                f"{path} normalizes text or has no byte fallback, so texts do not decode to "
                "themselves: expected a base such as Llama 2 or Mistral"
            )
        vocab = base.auto.get_vocab()
        for index, piece in enumerate(proto.pieces):
            if vocab.get(piece.piece) != index:
                raise DataError(
                    f"{path} has the piece {piece.piece!r} with id {index}, but tokenizer.json "
                    f"with {vocab.get(piece.piece)}: expected the same ids in both"
                )
        return cls(base, proto)

    def extend(self, pieces: Sequence[str]) -> "LlamaVocabulary":
        proto = append_pieces(self.proto, pieces)
        return LlamaVocabulary(self.base, proto, [*self.new_pieces, *pieces])

    def save(self, folder: Path) -> None:
        backend = self.base.backend
        self.base.save(append_pieces_to_json(backend, self.pieces, self.new_pieces), folder)

    def make_line_encoder(self) -> None:
        return None
