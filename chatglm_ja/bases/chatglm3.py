"""The family chatglm3: ChatGLM3's published layout, tokenizer and conversation format.

The room chatglm3/ knows the formats; this module shows them through the interface. Models of the
later steps are transformers' GlmForCausalLM, with tokenizer.model among their files.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import GenerationConfig

from chatglm_ja.bases.interface import Base, Description, ModelTokenizer
from chatglm_ja.bases.sentencepiece_vocabulary import ChatGLM3Vocabulary
from chatglm_ja.chatglm3 import chat_format, tokenizer, tokenizer_files
from chatglm_ja.chatglm3.base_config import glm_config, read_config
from chatglm_ja.chatglm3.corpus_tokenizer import CorpusTokenizer
from chatglm_ja.errors import DataError
from chatglm_ja.messages import Message

if TYPE_CHECKING:
    import torch

    from chatglm_ja.chatglm3.weights import BaseWeights


class ChatGLM3Tokenizer(ModelTokenizer):
    """A ModelProto with the nine special tokens among its pieces, new pieces after them."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.processor = tokenizer.make_processor(proto)
        self.size = len(proto.pieces)
        self.pieces = [piece.piece for piece in proto.pieces]
        self.first_new_id = chat_format.first_new_id(self.processor)
        self.document_start = chat_format.prefix_ids(self.processor)
        self.document_end = tokenizer.EOS_ID
        self.pad_id = tokenizer.UNK_ID
        self.special_ids = frozenset(filter(self.processor.is_control, range(self.size)))

    @classmethod
    def open(cls, folder: Path) -> "ChatGLM3Tokenizer":
        """Read the tokenizer of step 2's folder, of a model's or of a base. Raises DataError."""
        proto = tokenizer.read_proto(folder / tokenizer.MODEL_FILE)
        return cls(tokenizer.add_special_tokens(proto))

    @functools.cached_property
    def _corpus(self) -> CorpusTokenizer:
        return CorpusTokenizer(self.proto)

    @property
    def stop_ids(self) -> list[int]:
        return chat_format.stop_ids(self.processor)

    def encode(self, text: str) -> list[int]:
        return chat_format.encode_text(self.processor, text)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._corpus.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode(list(ids)))

    def spell(self, text: str) -> list[str]:
        return list(self.processor.encode(text, out_type=str))

    def split_pieces(self, first: int) -> list[list[int]]:
        base = type(self.proto)()
        base.CopyFrom(self.proto)
        del base.pieces[first:]
        # Without the dummy prefix, because the pieces stand inside texts.
        processor = tokenizer.make_processor(base, dummy_prefix=False)
        return list(processor.encode(self.pieces[first:]))

    def to_transformers(self) -> Any:
        return tokenizer_files.to_transformers(self.proto)

    @property
    def has_chat_format(self) -> bool:
        return True

    def build_prompt(self, messages: Sequence[Message]) -> list[int]:
        return chat_format.build_prompt_ids(self.processor, messages)

    def build_example(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        return chat_format.build_example(self.processor, messages)


class ChatGLM3Base(Base):
    """A ChatGLM3 folder: `config` is its config.json, `proto` its tokenizer.model (ModelProto)."""

    def __init__(self, folder: Path, config: Mapping[str, Any], proto: Any) -> None:
        missing = 0 if tokenizer.has_special_tokens(proto) else len(tokenizer.SPECIAL_TOKENS)
        self.folder, self.config, self.proto = folder, config, proto
        self.first_new_id = len(proto.pieces) + missing
        self.rows = config["padded_vocab_size"]
        self.window = config["seq_length"]

    @classmethod
    def open(cls, folder: Path) -> "ChatGLM3Base":
        """Read and validate config.json and tokenizer.model; weights are read on demand.

        Raises DataError for another architecture, another kind of tokenizer, and embeddings without
        rows for all ids, those of the nine special tokens among them.
        """
        path = folder / tokenizer.MODEL_FILE
        base = cls(folder, read_config(folder), tokenizer.read_proto(path))
        _check_tokenizer(base.proto, path)
        if base.rows < base.first_new_id:
            raise DataError(
                f"{path} has {len(base.proto.pieces)} pieces and needs {base.first_new_id} ids "
                f"with the special tokens, but config.json has padded_vocab_size {base.rows}"
            )
        return base

    @functools.cached_property
    def tokenizer(self) -> ChatGLM3Tokenizer:
        return ChatGLM3Tokenizer(tokenizer.add_special_tokens(self.proto))

    @functools.cached_property
    def vocabulary(self) -> ChatGLM3Vocabulary:
        return ChatGLM3Vocabulary(self.proto)

    @functools.cached_property
    def weights(self) -> "BaseWeights":
        from chatglm_ja.chatglm3.weights import BaseWeights

        return BaseWeights(self.folder, self.config)

    @property
    def embeddings(self) -> dict[str, str]:
        from chatglm_ja.chatglm3.tensor_names import EMBEDDING, NAMES, OUTPUT_LAYER

        return {name: NAMES[name] for name in (EMBEDDING, OUTPUT_LAYER)}

    def convert(self, name: str, tensor: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
        from chatglm_ja.chatglm3.tensor_names import to_glm

        return to_glm(name, tensor, self.config)

    def describe(self) -> Description:
        return Description(
            name="ChatGLM3",
            model_class="GlmForCausalLM",
            prefix=" ".join(chat_format.INPUT_PREFIX),
            sampling="temperature {temperature}, top p {top_p}".format_map(chat_format.SAMPLING),
            license_file="MODEL_LICENSE",
            license_name="chatglm3-6b",
            license_note="ChatGLM3-6B's is free for academic research, and for commercial use "
            "after registration with its publisher.",
        )

    def save_config(self, folder: Path, rows: int, ids: int) -> None:
        glm_config(self.config, rows, self.weights.dtype).save_pretrained(folder)
        GenerationConfig(
            do_sample=True,
            **chat_format.SAMPLING,
            bos_token_id=tokenizer.BOS_ID,
            eos_token_id=self.tokenizer.stop_ids,
            pad_token_id=tokenizer.UNK_ID,
            suppress_tokens=list(range(ids, rows)) or None,
        ).save_pretrained(folder)

    def load(self, dtype: "torch.dtype") -> Any:
        from chatglm_ja.chatglm3.weights import load_base

        return load_base(self.weights, dtype)


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
