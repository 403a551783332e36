"""ChatGLM3's tokenizer: its sentencepiece model, its special tokens, and encoding with it.

tokenizer.model is a sentencepiece BPE model with P pieces. Nine special tokens, which have no
pieces in it, take the next ids. The pipeline gives them pieces of type CONTROL, which sentencepiece
never produces from a text, and appends new pieces. A model that step 8 exported as ChatGLM3's own
has them already, and is a base for more pieces:

    ids   0 ............ P-1 | P ................. P+8 | P+9 ............
          the base's pieces  | [MASK] ... as control   | new pieces
                             | pieces, never in text   | scores below all others

A piece's score is the rank of its merge. New pieces rank after all of the base's, in the order they
were learned. So the base's merges happen first, and a text without a new piece keeps its ids.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from chatglm_ja.chatglm3.base_config import MODEL_FILE
from chatglm_ja.errors import DataError

# The generated module creates its classes on import, where mypy cannot see them.
messages: Any = sentencepiece_model_pb2

SPACE = "\u2581"  # sentencepiece's symbol for a space

# ChatGLM3's special tokens, in the order of their ids after the last piece.
SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_PIECES = ("<unk>", "<s>", "</s>")
# An answer ends at </s>, or where the model begins the turn of another role.
STOP_TOKENS = ("</s>", "<|user|>", "<|observation|>")


def parse_proto(data: bytes, origin: Path) -> Any:
    """Parse a sentencepiece BPE model (ModelProto). Raises DataError if it is anything else."""
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise DataError(f"{origin} is not a sentencepiece model") from None
    # What follows the pieces is missing if a download was cut off between two fields.
    for part, is_there in (("pieces", proto.pieces), ("settings", proto.HasField("trainer_spec"))):
        if not is_there:
            raise DataError(f"{origin} is not a sentencepiece model, or is cut: it has no {part}")
    if proto.trainer_spec.model_type != messages.TrainerSpec.BPE:
        kind = messages.TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).lower()
        raise DataError(
            f"{origin} is a {kind} model, whose scores are not merge ranks: expected one trained "
            "with model_type=bpe"
        )
    return proto


def read_proto(path: Path) -> Any:
    """Read a sentencepiece BPE model (ModelProto) from a file.

    Raises DataError if it is missing, is another kind of model, does not load in sentencepiece, or
    has a piece that is not UTF-8 or a non-finite score.
    """
    try:
        proto = parse_proto(path.read_bytes(), path)
        make_processor(proto)
    except FileNotFoundError:
        raise DataError(f"{path} not found: expected a sentencepiece model") from None
    # A repeated or empty piece; UnicodeDecodeError if sentencepiece cannot name it in its message.
    except (RuntimeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise DataError(f"{path} is a damaged sentencepiece model ({reason})") from None
    for index, piece in enumerate(proto.pieces):
        # protobuf returns bytes for a piece that is not UTF-8.
        if not isinstance(piece.piece, str) or not math.isfinite(piece.score):
            raise DataError(
                f"{path} is a damaged sentencepiece model: piece {index} is {piece.piece!r} with "
                f"score {piece.score}"
            )
    return proto


def load_processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Load the tokenizer of a folder as a processor, which never makes special tokens of text."""
    return make_processor(read_proto(folder / MODEL_FILE))


def make_processor(proto: Any, dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """Make a processor of a ModelProto.

    Without the dummy prefix, the space before every text, it encodes as in the middle of a text.
    """
    if not dummy_prefix:
        proto = copy.deepcopy(proto)
        proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def add_special_tokens(base: Any, new_pieces: Sequence[str] = ()) -> Any:
    """Append the special tokens as control pieces, then new pieces, to the base's ModelProto.

    Special tokens that the base has already are not appended again.
    """
    proto = copy.deepcopy(base)
    if not has_special_tokens(base):
        for token in SPECIAL_TOKENS:
            proto.pieces.add(piece=token, score=0.0, type=proto.SentencePiece.CONTROL)
    return append_pieces(proto, new_pieces)


def append_pieces(base: Any, new_pieces: Sequence[str]) -> Any:
    """Append new pieces to a ModelProto, each with a lower score than all pieces before it.

    The base is not changed.
    """
    proto = copy.deepcopy(base)
    lowest = min(piece.score for piece in base.pieces)
    for rank, piece in enumerate(new_pieces, start=1):
        proto.pieces.add(piece=piece, score=lowest - rank, type=proto.SentencePiece.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def has_special_tokens(proto: Any) -> bool:
    """Return whether a ModelProto has the special tokens, as pieces of type CONTROL."""
    token, kind = SPECIAL_TOKENS[0], proto.SentencePiece.CONTROL
    return any(piece.piece == token and piece.type == kind for piece in proto.pieces)


def is_lossless(proto: Any) -> bool:
    """Return whether every text decodes from its pieces to itself, as with ChatGLM3's tokenizer.

    That is so if text is not normalized and characters without a piece are spelled in bytes.
    """
    spec = proto.normalizer_spec
    return bool(
        spec.add_dummy_prefix
        and spec.escape_whitespaces
        and not spec.remove_extra_whitespaces
        and not spec.precompiled_charsmap
        and not proto.trainer_spec.treat_whitespace_as_suffix
        and proto.trainer_spec.byte_fallback
    )


def encode_texts(
    tokenizer: Any, texts: Iterable[str], num_threads: int, batch: int = 512
) -> Iterator[list[int]]:
    """Encode a stream of texts in batches on several threads; yield the ids of each, in order."""
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, batch)):
        yield from tokenizer.encode(chunk, num_threads=num_threads)
