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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from chatglm_ja.base_config import read_config
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
# The answer ends where the model wants to hand over: at </s>, or when it opens another role.
STOP_TOKENS = ("</s>", "<|user|>", "<|observation|>")


def parse_model(data: bytes, origin: Path) -> Any:
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


def read_model(path: Path) -> Any:
    """The ModelProto of a file; DataError if it is missing or no sentencepiece BPE model."""
    try:
        return parse_model(path.read_bytes(), path)
    except FileNotFoundError:
        raise DataError(f"{path} not found: expected a sentencepiece model") from None


def load(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of a folder, for encoding: text never becomes a special token with it."""
    return processor(read_model(folder / MODEL_FILE))


def processor(proto: Any, dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A processor of a ModelProto; without the dummy prefix it encodes as inside a text."""
    if not dummy_prefix:
        copy = type(proto)()
        copy.CopyFrom(proto)
        copy.normalizer_spec.add_dummy_prefix = False
        proto = copy
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def with_special_tokens(base: Any, new_pieces: Sequence[str] = ()) -> Any:
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


def read_base(folder: Path) -> Any:
    """The ModelProto of a ChatGLM3 folder, of which only tokenizer.model and config.json are read.

    Raises DataError for another kind of tokenizer, and where the embedding has no rows for the
    nine special tokens after the pieces.
    """
    path = folder / MODEL_FILE
    proto = read_model(path)
    rows = read_config(folder)["padded_vocab_size"]
    if proto.normalizer_spec.precompiled_charsmap:
        raise DataError(f"{path} normalises text, which ChatGLM3's does not: wrong base model?")
    taken = [piece.piece for piece in proto.pieces if piece.piece in SPECIAL_TOKENS]
    if taken:
        raise DataError(f"{path} holds {', '.join(taken)} as pieces: it is merged already")
    needed = len(proto.pieces) + len(SPECIAL_TOKENS)
    if rows < needed:
        raise DataError(
            f"{path} has {len(proto.pieces)} pieces and needs {needed} ids with the special "
            f"tokens, but config.json has padded_vocab_size {rows}"
        )
    return proto


def encode_documents(
    encoder: Any, texts: Iterable[str], num_threads: int, batch: int = 512
) -> Iterator[list[int]]:
    """Encode a stream of texts in batches, on several threads; the order is kept."""
    texts = iter(texts)
    while True:
        chunk = list(itertools.islice(texts, batch))
        if not chunk:
            return
        yield from encoder.encode(chunk, num_threads=num_threads)
