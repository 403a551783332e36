"""A ChatGLM3 base model, opened and validated once per step and passed on.

A second family of bases would be a room beside this one with the same small interface.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ja.chatglm3.base_config import read_config
from chatglm_ja.chatglm3.tokenizer import (
    FIRST_PIECES,
    MODEL_FILE,
    SPECIAL_TOKENS,
    is_lossless,
    messages,
    read_proto,
)
from chatglm_ja.errors import DataError

if TYPE_CHECKING:
    from chatglm_ja.chatglm3.weights import BaseWeights


@dataclass(frozen=True)
class Base:
    """A ChatGLM3 folder: `config` is its config.json, `proto` its tokenizer.model (ModelProto)."""

    folder: Path
    config: Mapping[str, Any]
    proto: Any

    @classmethod
    def open(cls, folder: Path) -> "Base":
        """Read and validate config.json and tokenizer.model; weights are read on demand.

        Raises DataError for another architecture, another kind of tokenizer, a tokenizer that was
        merged already, and embeddings without rows for the nine special tokens.
        """
        proto = read_proto(folder / MODEL_FILE)
        config = read_config(folder)
        _check_tokenizer(proto, folder / MODEL_FILE)
        base = cls(folder, config, proto)
        if config["padded_vocab_size"] < base.first_new_id:
            raise DataError(
                f"{folder / MODEL_FILE} has {len(proto.pieces)} pieces and needs "
                f"{base.first_new_id} ids with the special tokens, but config.json has "
                f"padded_vocab_size {config['padded_vocab_size']}"
            )
        return base

    @property
    def first_special_id(self) -> int:
        """The id of [MASK]: the nine special tokens follow the base's pieces."""
        return len(self.proto.pieces)

    @property
    def first_new_id(self) -> int:
        """The id of the first piece that step 2 adds: new pieces follow the special tokens."""
        return self.first_special_id + len(SPECIAL_TOKENS)

    @functools.cached_property
    def weights(self) -> "BaseWeights":
        """The weights, validated when they are first used. Raises DataError if they are damaged."""
        from chatglm_ja.chatglm3.weights import BaseWeights

        return BaseWeights(self.folder, self.config)


def _check_tokenizer(proto: Any, path: Path) -> None:
    """Raise DataError unless the model is one that new pieces can be appended to."""
    if not is_lossless(proto):
        raise DataError(
            f"{path} normalizes text or has no byte fallback, unlike ChatGLM3's: wrong base model?"
        )
    kinds = messages.ModelProto.SentencePiece
    first = [(piece.piece, piece.type) for piece in proto.pieces[: len(FIRST_PIECES)]]
    if first != list(zip(FIRST_PIECES, (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL), strict=True)):
        shown = ", ".join(repr(piece) for piece, _ in first)
        raise DataError(
            f"{path} begins with {shown}, expected the special pieces {', '.join(FIRST_PIECES)}: "
            "wrong base model?"
        )
    taken = [piece.piece for piece in proto.pieces if piece.piece in SPECIAL_TOKENS]
    if taken:
        raise DataError(f"{path} holds {', '.join(taken)} as pieces: it is merged already")
    for piece in proto.pieces[len(first) :]:
        if piece.type not in (kinds.NORMAL, kinds.BYTE):  # `tokenizers` has no other types
            raise DataError(
                f"{path}: the piece {piece.piece!r} is of type {kinds.Type.Name(piece.type)}, "
                "expected only NORMAL and BYTE after the first three: wrong base model?"
            )
