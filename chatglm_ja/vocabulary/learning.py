"""The Japanese vocabulary: learning its pieces, and choosing those that the base is to get.

Step 1 learns pieces, either with sentencepiece from characters or by continuing the base's merges
(continued_bpe.py), and writes them as a sentencepiece BPE model. Step 2 appends to the base those
that a policy admits and that the merged tokenizer can produce:

    learned ─┬─ in the base already
             ├─ outside the policy      would change how Chinese or English is cut
             ├─ unspellable             a character has no piece: `tokenizers` spells it in bytes
             ├─ unreachable             the base's merges take its parts first, wherever it stands
             ├─ past --max-new-pieces   used less often than those that are kept
             └─ added                   every one of them is produced by some text
"""

import functools
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from chatglm_ja.chatglm3.tokenizer import (
    parse_proto,
    read_proto,
)
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary.policies import admits

JA_MODEL_FILE = "ja_bpe.model"

# --- Policies: which pieces may be added -------------------------------------------------------


# --- Step 1: learning --------------------------------------------------------------------------


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
    reason, when the text does not give `vocab_size` pieces.
    """
    failure: list[BaseException] = []

    def guarded() -> Iterable[str]:
        """sentencepiece turns an exception of its iterator into one of its own: keep it."""
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
            max_sentence_length=2**30,  # longer lines would be dropped in silence
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
    policy: str,
    *,
    vocab_size: int,
    character_coverage: float,
    num_threads: int,
    max_piece_length: int,
) -> Any:
    """Learn pieces that continue the base's merges, as a ModelProto like that of `train`.

    It holds the control and byte pieces of `base`, then the merges, then characters, `vocab_size`
    in all. Alone it is no tokenizer: most of its pieces are made of the base's pieces. Raises
    DataError when the text does not give `vocab_size` pieces.
    """
    from chatglm_ja.vocabulary import continued_bpe

    kept = [piece for piece in base.pieces if piece.type != piece.NORMAL]
    learned = continued_bpe.learn(
        base,
        Counter(lines),
        count=vocab_size - len(kept),
        admits=functools.partial(admits, policy),
        max_piece_length=max_piece_length,
        character_coverage=character_coverage,
        num_threads=num_threads,
    )
    found = len(kept) + len(learned.merges) + len(learned.characters)
    if found < vocab_size:
        raise DataError(
            f"this text gives {found} pieces, expected {vocab_size}: lower --vocab-size or give "
            "more text"
        )
    proto = type(base)()
    proto.CopyFrom(base)
    del proto.pieces[:]
    proto.pieces.extend(kept)
    for rank, piece in enumerate([*learned.merges, *learned.characters]):
        proto.pieces.add(piece=piece, score=-rank, type=proto.SentencePiece.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def save_learned(proto: Any, folder: Path) -> None:
    """Write ja_bpe.model and, to read, ja_bpe.vocab: a line of piece and score for each."""
    (folder / JA_MODEL_FILE).write_bytes(proto.SerializeToString())
    vocab = "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in proto.pieces)
    (folder / "ja_bpe.vocab").write_text(vocab, encoding="utf-8")


def read_learned(path: Path) -> Any:
    """The ModelProto of step 1's folder, or of any sentencepiece BPE model file."""
    path = path / JA_MODEL_FILE if path.is_dir() else path
    return read_proto(path)


# --- Step 2: merging ---------------------------------------------------------------------------
