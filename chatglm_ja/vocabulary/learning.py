"""Step 1: learning Japanese pieces, as a sentencepiece BPE model.

Pieces are learned by sentencepiece from characters, or by continuing the base's own merges
(continued_bpe.py).
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from chatglm_ja.chatglm3.tokenizer import parse_proto, read_proto
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary import continued_bpe
from chatglm_ja.vocabulary.policies import Policy

JA_MODEL_FILE = "ja_bpe.model"


def train_sentencepiece(
    lines: Iterable[str],
    *,
    vocab_size: int,
    character_coverage: float,
    num_threads: int,
    settings: Mapping[str, Any],
) -> Any:
    """Train a sentencepiece BPE model (ModelProto) from characters, on lines of text.

    `settings` are further settings of sentencepiece's trainer. The result depends on the lines
    and the settings only, not on the number of threads. Raises DataError, with sentencepiece's
    reason, if the text does not give `vocab_size` pieces.
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
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=num_threads,
            max_sentence_length=2**30,  # sentencepiece silently drops longer lines
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        if failure:
            raise failure[0] from None
        reason = str(error).splitlines()[-1].strip().rpartition("] ")[2]
        raise DataError(
            f"sentencepiece could not learn {vocab_size} pieces from this text ({reason}): change "
            "--vocab-size or give more text"
        ) from None
    proto = parse_proto(model.getvalue(), Path(JA_MODEL_FILE))
    proto.trainer_spec.ClearField("num_threads")
    return proto


def continue_merges(
    base: Any,
    lines: Iterable[str],
    policy: Policy,
    *,
    vocab_size: int,
    character_coverage: float,
    num_threads: int,
    max_piece_length: int,
) -> Any:
    """Learn pieces that continue the merges of `base` (ModelProto), as a ModelProto.

    It holds the control and byte pieces of `base`, then merges, then characters, `vocab_size` in
    all. It is not a tokenizer by itself, since most of its pieces are made of the base's pieces.
    Raises DataError if the text does not give `vocab_size` pieces.
    """
    control_and_bytes = [piece for piece in base.pieces if piece.type != piece.NORMAL]
    learned = continued_bpe.learn(
        base,
        Counter(lines),
        count=vocab_size - len(control_and_bytes),
        admits=policy.admits,
        max_piece_length=max_piece_length,
        character_coverage=character_coverage,
        num_threads=num_threads,
    )
    proto = type(base)()
    proto.CopyFrom(base)
    del proto.pieces[:]
    proto.pieces.extend(control_and_bytes)
    for rank, piece in enumerate([*learned.merges, *learned.characters]):
        proto.pieces.add(piece=piece, score=-rank, type=proto.SentencePiece.NORMAL)
    if len(proto.pieces) < vocab_size:
        raise DataError(
            f"this text gives {len(proto.pieces)} pieces, expected {vocab_size}: lower "
            "--vocab-size or give more text"
        )
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def save_learned(proto: Any, folder: Path) -> None:
    """Write ja_bpe.model, and ja_bpe.vocab for reading: a line of piece and score for each."""
    (folder / JA_MODEL_FILE).write_bytes(proto.SerializeToString())
    vocab = "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in proto.pieces)
    (folder / "ja_bpe.vocab").write_text(vocab, encoding="utf-8")


def read_learned(path: Path) -> Any:
    """Read the ModelProto of step 1's folder, or of any sentencepiece BPE model file."""
    return read_proto(path / JA_MODEL_FILE if path.is_dir() else path)
