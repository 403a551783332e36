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
import itertools
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from chatglm_ja.errors import DataError
from chatglm_ja.tokenizer import (
    SPECIAL_TOKENS,
    encode_documents,
    parse_model,
    processor,
    read_model,
    with_special_tokens,
)

JA_MODEL_FILE = "ja_bpe.model"

# --- Policies: which pieces may be added -------------------------------------------------------

# Hiragana and katakana letters and the long-vowel mark, of any width.
_KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
_HAN = "\u3400-\u9fff\uf900-\ufaff\u3005"


def _encodable(character: str, codec: str) -> bool:
    try:
        character.encode(codec)
    except UnicodeEncodeError:
        return False
    return True


@functools.cache
def japanese_kanji() -> str:
    """The kanji of JIS X 0208 that are in neither GB 2312 nor Big5: 込, 働, 気, 図 ...

    Python's shift_jis codec covers JIS X 0208 and no kanji beyond it (euc_jp adds JIS X 0212).
    """
    han = (chr(code) for code in range(0x10000) if re.match(f"[{_HAN}]", chr(code)))
    return "".join(
        character
        for character in han
        if _encodable(character, "shift_jis")
        and not _encodable(character, "gb2312")
        and not _encodable(character, "big5")
    )


@functools.cache
def other_letters() -> str:
    """The letters that neither English nor Chinese is written in, and the vowel signs of scripts
    that have such: 한, й, ß, ไ and its ี. Not the marks that any script may use: combining accents,
    tone marks, variation selectors."""
    ours = re.compile(f"[A-Za-z\uff21-\uff3a\uff41-\uff5a{_HAN}\U00020000-\U0003ffff]")
    shared_marks = re.compile(
        "[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u302a-\u302f\ufe00-\ufe0f"
        "\ufe20-\ufe2f\U000e0100-\U000e01ef]"
    )
    every = map(chr, range(sys.maxunicode + 1))
    letters = (character for character in every if unicodedata.category(character)[0] in "LM")
    return "".join(c for c in letters if not ours.match(c) and not shared_marks.match(c))


@functools.cache
def _admitted(policy: str) -> re.Pattern[str]:
    classes: dict[str, Callable[[], str]] = {  # each takes a moment to make
        "kana": lambda: f"[{_KANA}]",
        "japanese": lambda: f"[{_KANA}{japanese_kanji()}]",
        "han": lambda: f"[{_KANA}{_HAN}]",
        "letters": lambda: f"[{other_letters()}]",
        "all": lambda: "",
    }
    return re.compile(classes[policy]())


def admits(policy: str, text: str) -> bool:
    """Whether the policy may add this piece: one of its characters is what the policy asks for.

    Of a whole line: whether the line may change. A line without such a character holds none
    of the new pieces, so it keeps its ids.
    """
    return _admitted(policy).search(text) is not None


GUARANTEES = {
    "kana": "A line without kana keeps its ids.",
    "japanese": "A line without kana whose Han characters are all in GB 2312 or Big5, the "
    "standards of simplified and traditional Chinese, keeps its ids, and so does every line "
    "without Han characters. (Precisely: a line without kana and without a kanji that is in JIS X "
    "0208 and in neither of the two.)",
    "han": "A line without kana and Han characters keeps its ids: English; Chinese may change.",
    "letters": "A line whose letters are all A to Z, a to z or Han characters keeps its ids: "
    "English and Chinese. (Vowel signs of other scripts count as letters.)",
    "all": "None: Chinese and English lines may change, and pieces that no text produces are kept.",
}


# --- Step 1: learning --------------------------------------------------------------------------


def train(
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
    proto = parse_model(model.getvalue(), Path(JA_MODEL_FILE))
    proto.trainer_spec.ClearField("num_threads")
    return proto


def continue_base(
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
    from chatglm_ja import continued_bpe

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
    return read_model(path)


# --- Step 2: merging ---------------------------------------------------------------------------


@dataclass
class Merge:
    """A merged model (ModelProto) and what became of every Japanese piece."""

    proto: Any
    added: list[str]
    # Reason -> pieces. Under the policy `all` the unspellable and unreachable ones are added.
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {
            "base_pieces": len(self.proto.pieces) - len(self.added) - len(SPECIAL_TOKENS),
            "added": len(self.added),
            **{reason: len(pieces) for reason, pieces in self.dropped.items()},
            "vocabulary": len(self.proto.pieces),
        }


def merge(
    base: Any,
    japanese: Any,
    policy: str,
    *,
    max_new_pieces: int = 0,
    ranking_texts: Iterable[str] = (),
) -> Merge:
    """Append the pieces of `japanese` (ModelProto) that `policy` admits to `base` (ModelProto).

    Pieces that could never be produced are left out, except under `all`, which keeps and only
    reports them. With `max_new_pieces`, those pieces are kept that are used most on
    `ranking_texts`, see `uses`.
    """
    known = {piece.piece for piece in base.pieces}.union(SPECIAL_TOKENS)
    candidates = [p.piece for p in japanese.pieces if p.type == p.NORMAL]
    new = [piece for piece in candidates if piece not in known]
    chosen = [piece for piece in new if admits(policy, piece)]
    # Single characters first: every longer piece is merged from them.
    single = {piece for piece in known.union(chosen) if len(piece) == 1}
    unspellable = [piece for piece in chosen if not single.issuperset(piece)]
    if policy != "all":
        chosen = _without(chosen, unspellable)
    unreachable = _unreachable(base, chosen)
    if policy != "all":
        # Once is enough: a piece that never forms takes no part in making another.
        chosen = _without(chosen, unreachable)
    dropped = {
        "already_known": [piece for piece in candidates if piece in known],
        "outside_policy": [piece for piece in new if not admits(policy, piece)],
        "unspellable": unspellable,
        "unreachable": unreachable,
    }
    if max_new_pieces and len(chosen) > max_new_pieces:
        use = uses(base, chosen, ranking_texts)
        if not any(use.values()):
            raise DataError(
                "--ranking-sources hold no text that any new piece occurs in: give other texts "
                "or leave --max-new-pieces away"
            )
        # A piece is used at least as often as those made from it, which are longer, so that what
        # remains is still reachable.
        ranked = sorted(chosen, key=lambda piece: (-use[piece], len(piece)))
        past = set(ranked[max_new_pieces:])
        dropped["past_max_new_pieces"] = [piece for piece in chosen if piece in past]
        chosen = _without(chosen, past)
        if policy == "all":  # the two lists name pieces that are added all the same
            for reason in ("unspellable", "unreachable"):
                dropped[reason] = _without(dropped[reason], past)
    return Merge(with_special_tokens(base, chosen), chosen, dropped)


def _without(pieces: list[str], left_out: Iterable[str]) -> list[str]:
    left_out = set(left_out)
    return [piece for piece in pieces if piece not in left_out]


def _unreachable(base: Any, pieces: list[str]) -> list[str]:
    """The pieces that no text encodes to when they are added to the base.

    When a piece appears in a text, no merge crossed its borders, so the merges inside it were
    those of the piece alone: it is reachable if and only if it encodes to itself. The dummy
    prefix is switched off for that, because a piece can stand anywhere.
    """
    encoder = processor(with_special_tokens(base, pieces), dummy_prefix=False)
    # sentencepiece reads its own mark of a space as one.
    encoded = encoder.encode(pieces)
    return [
        piece
        for piece, ids in zip(pieces, encoded, strict=True)
        if len(ids) != 1 or encoder.id_to_piece(ids[0]) != piece
    ]


def uses(base: Any, pieces: list[str], texts: Iterable[str]) -> dict[str, int]:
    """How many merges into each new piece the merged tokenizer makes on these texts.

    That is how often the piece remains as a token, or is a part of a longer one that does. Each
    merge makes the texts one token shorter.
    """
    proto = with_special_tokens(base, pieces)
    encoder = processor(proto)
    tokens: Counter[int] = Counter()
    for ids in encode_documents(encoder, texts, num_threads=1):
        tokens.update(ids)
    ranks = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    use = {piece: tokens[encoder.piece_to_id(piece)] for piece in pieces}
    for piece in sorted(pieces, key=len, reverse=True):  # what is made of a piece comes before it
        for part in _parts(piece, ranks):
            if part in use:
                use[part] += use[piece]
    return use


def _parts(piece: str, scores: Mapping[str, float]) -> list[str]:
    """The two pieces whose merge makes a reachable piece; none for a single character."""
    symbols = list(piece)
    while len(symbols) > 2:
        joined = [a + b for a, b in itertools.pairwise(symbols)]
        at = max(range(len(joined)), key=lambda i: (scores.get(joined[i], -math.inf), -i))
        symbols[at : at + 2] = [joined[at]]
    return symbols if len(piece) > 1 else []
