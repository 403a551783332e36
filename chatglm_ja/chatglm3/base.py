"""A ChatGLM3 base model, opened and validated once per step and passed on."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.chatglm3.base_config import read_config
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

        Raises DataError for another architecture, another kind of tokenizer, and embeddings without
        rows for all ids, those of the nine special tokens among them.
        """
        path = folder / tokenizer.MODEL_FILE
        base = cls(folder, read_config(folder), tokenizer.read_proto(path))
        _check_tokenizer(base.proto, path)
        rows = base.config["padded_vocab_size"]
        if rows < base.first_new_id:
            raise DataError(
                f"{path} has {len(base.proto.pieces)} pieces and needs {base.first_new_id} ids "
                f"with the special tokens, but config.json has padded_vocab_size {rows}"
            )
        return base

    @property
    def first_new_id(self) -> int:
        """The id of the first piece that step 2 adds: it follows the pieces and special tokens."""
        missing = 0 if tokenizer.has_special_tokens(self.proto) else len(tokenizer.SPECIAL_TOKENS)
        return len(self.proto.pieces) + missing

    @functools.cached_property
    def weights(self) -> "BaseWeights":
        """The weights, validated when they are first used. Raises DataError if they are damaged."""
        from chatglm_ja.chatglm3.weights import BaseWeights

        return BaseWeights(self.folder, self.config)


def _check_tokenizer(proto: Any, path: Path) -> None:
    """Raise DataError unless the model is one that new pieces can be appended to."""
    if not tokenizer.is_lossless(proto):
        raise DataError(
            f"{path} normalizes text or has no byte fallback, unlike ChatGLM3's: wrong base model?"
        )
    kinds = tokenizer.messages.ModelProto.SentencePiece
    types = (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL)
    pieces = [(piece.piece, piece.type) for piece in proto.pieces]
    if pieces[:3] != list(zip(tokenizer.FIRST_PIECES, types, strict=True)):
        raise DataError(
            f"{path} begins with {', '.join(repr(piece) for piece, _ in pieces[:3])}, expected the "
            f"special pieces {', '.join(tokenizer.FIRST_PIECES)}: wrong base model?"
        )
    special = [at for at, (piece, _) in enumerate(pieces) if piece in tokenizer.SPECIAL_TOKENS]
    if special:  # as step 2 appends them, in a model that step 8 exported
        block = slice(special[0], special[0] + len(tokenizer.SPECIAL_TOKENS))
        if pieces[block] != [(token, kinds.CONTROL) for token in tokenizer.SPECIAL_TOKENS]:
            found = ", ".join(pieces[at][0] for at in special)
            raise DataError(
                f"{path} holds {found} as pieces, expected none of the special tokens, or all "
                "nine in a row as step 2 appends them: wrong base model?"
            )
        del pieces[block]
    for piece, kind in pieces[3:]:
        if kind not in (kinds.NORMAL, kinds.BYTE):  # `tokenizers` has no other types
            raise DataError(
                f"{path}: the piece {piece!r} is of type {kinds.Type.Name(kind)}, expected only "
                "NORMAL and BYTE after the first three: wrong base model?"
            )
