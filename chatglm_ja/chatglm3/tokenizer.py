"""ChatGLM3's tokenizer: its sentencepiece model, its special tokens, and encoding with it.

tokenizer.model is a sentencepiece BPE model with P pieces; nine special tokens without pieces
take the next ids. The pipeline gives them pieces of type CONTROL, which sentencepiece never
produces from a text, and appends new pieces behind them:

    ids   0 ............ P-1 | P ................. P+8 | P+9 ............
          the base's pieces  | [MASK] ... as control   | new pieces
                             | pieces, never in text   | scores below all others

A piece's score is its merge's rank. New pieces come after the base's last rank in the order they
were learned, so the base's merges happen first, exactly as before: a text that holds no new piece
is segmented exactly as it was.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from chatglm_ja.chatglm3.base_config import read_config
from chatglm_ja.errors import DataError

# The classes of this generated module are made at import, where mypy cannot see them.
messages: Any = sentencepiece_model_pb2

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"  # sentencepiece's mark of a space

# ChatGLM3's special tokens, in the order of their ids after the last piece.
SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_PIECES = ("<unk>", "<s>", "</s>")
# The answer ends where the model wants to hand over: at </s>, or when it opens another role.
STOP_TOKENS = ("</s>", "<|user|>", "<|observation|>")


def parse_proto(data: bytes, origin: Path) -> Any:
    """The ModelProto of a sentencepiece BPE model; DataError if it is anything else."""
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise DataError(f"{origin} is not a sentencepiece model") from None
    if not proto.pieces:
        raise DataError(f"{origin} is not a sentencepiece model: it has no pieces")
    if proto.trainer_spec.model_type != messages.TrainerSpec.BPE:
        found = messages.TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).lower()
        raise DataError(
            f"{origin} is a {found} model, whose scores are no merges: expected one trained with "
            "model_type=bpe"
        )
    return proto


def read_proto(path: Path) -> Any:
    """The ModelProto of a file; DataError if it is missing or no sentencepiece BPE model, or one
    that sentencepiece does not load, or whose scores are no order."""
    try:
        proto = parse_proto(path.read_bytes(), path)
        make_processor(proto)
    except FileNotFoundError:
        raise DataError(f"{path} not found: expected a sentencepiece model") from None
    # A piece twice, or an empty one; the second where the piece to be named is no UTF-8.
    except (RuntimeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise DataError(f"{path} is a damaged sentencepiece model ({reason})") from None
    for index, piece in enumerate(proto.pieces):
        # protobuf gives bytes for what is no UTF-8.
        if not isinstance(piece.piece, str) or not math.isfinite(piece.score):
            raise DataError(
                f"{path} is a damaged sentencepiece model: piece {index} is {piece.piece!r} with "
                f"the score {piece.score}"
            )
    return proto


def load_processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of a folder, for encoding: text never becomes a special token with it."""
    return make_processor(read_proto(folder / MODEL_FILE))


def make_processor(proto: Any, dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A processor of a ModelProto; without the dummy prefix it encodes as inside a text."""
    if not dummy_prefix:
        copy = type(proto)()
        copy.CopyFrom(proto)
        copy.normalizer_spec.add_dummy_prefix = False
        proto = copy
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def add_special_tokens(base: Any, new_pieces: Sequence[str] = ()) -> Any:
    """The base with its special tokens as control pieces in their places, then new pieces."""
    proto = type(base)()
    proto.CopyFrom(base)
    for token in SPECIAL_TOKENS:
        proto.pieces.add(piece=token, score=0.0, type=proto.SentencePiece.CONTROL)
    lowest = min(piece.score for piece in base.pieces)
    for rank, piece in enumerate(new_pieces, start=1):
        proto.pieces.add(piece=piece, score=lowest - rank, type=proto.SentencePiece.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def is_lossless(proto: Any) -> bool:
    """Whether every text can be read back from its pieces, as with ChatGLM3's: nothing in it is
    normalised, and what has no piece is spelled in bytes."""
    spec = proto.normalizer_spec
    return bool(
        spec.add_dummy_prefix
        and spec.escape_whitespaces
        and not spec.remove_extra_whitespaces
        and not spec.precompiled_charsmap
        and not proto.trainer_spec.treat_whitespace_as_suffix
        and proto.trainer_spec.byte_fallback
    )


def read_base_proto(folder: Path) -> Any:
    """The ModelProto of a ChatGLM3 folder, of which only tokenizer.model and config.json are read.

    Raises DataError for another kind of tokenizer, and where the embedding has no rows for the
    nine special tokens after the pieces.
    """
    path = folder / MODEL_FILE
    proto = read_proto(path)
    rows = read_config(folder)["padded_vocab_size"]
    if not is_lossless(proto):
        raise DataError(
            f"{path} normalises text or has no byte fallback, other than ChatGLM3's: wrong base "
            "model?"
        )
    first = [(piece.piece, piece.type) for piece in proto.pieces[: len(FIRST_PIECES)]]
    kinds = messages.ModelProto.SentencePiece
    if first != list(zip(FIRST_PIECES, (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL), strict=True)):
        found = ", ".join(repr(piece) for piece, _ in first)
        raise DataError(
            f"{path} begins with {found}, expected the special pieces {', '.join(FIRST_PIECES)}: "
            "wrong base model?"
        )
    taken = [piece.piece for piece in proto.pieces if piece.piece in SPECIAL_TOKENS]
    if taken:
        raise DataError(f"{path} holds {', '.join(taken)} as pieces: it is merged already")
    odd = [p for p in proto.pieces[len(first) :] if p.type not in (kinds.NORMAL, kinds.BYTE)]
    if odd:  # `tokenizers` knows no such types
        raise DataError(
            f"{path}: the piece {odd[0].piece!r} is of type {kinds.Type.Name(odd[0].type)}, "
            "expected only NORMAL and BYTE after the first three: wrong base model?"
        )
    needed = len(proto.pieces) + len(SPECIAL_TOKENS)
    if rows < needed:
        raise DataError(
            f"{path} has {len(proto.pieces)} pieces and needs {needed} ids with the special "
            f"tokens, but config.json has padded_vocab_size {rows}"
        )
    return proto


def encode_texts(
    encoder: Any, texts: Iterable[str], num_threads: int, batch: int = 512
) -> Iterator[list[int]]:
    """Encode a stream of texts in batches, on several threads; the order is kept."""
    texts = iter(texts)
    while True:
        chunk = list(itertools.islice(texts, batch))
        if not chunk:
            return
        yield from encoder.encode(chunk, num_threads=num_threads)
