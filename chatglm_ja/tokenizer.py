"""The Japanese vocabulary: training it, merging it into ChatGLM3's, exporting and comparing.

ChatGLM3's tokenizer.model is a sentencepiece BPE model with P pieces; nine special tokens without
pieces take the next ids. The merge keeps every id and lets Japanese start behind them:

    ids   0 ............ P-1 | P ................. P+8 | P+9 ............
          the base's pieces  | [MASK] ... as control   | new pieces
                             | pieces, never in text   | scores below all others

A piece's score is its merge's rank. New pieces come after the base's last rank in the order they
were learned, so the base's merges happen first, exactly as before: a text that holds no new piece
is segmented exactly as it was.
"""

import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from chatglm_ja.errors import DataError

# The classes of this generated module are made at import, where mypy cannot see them.
messages: Any = sentencepiece_model_pb2

MODEL_FILE = "tokenizer.model"
FILES = (MODEL_FILE, "tokenizer.json", "tokenizer_config.json")
JA_MODEL_FILE = "ja_bpe.model"
SPACE = "\u2581"  # sentencepiece's mark of a space

# ChatGLM3's special tokens, in the order of their ids after the last piece.
SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
# The answer ends where the model wants to hand over: at </s>, or when it opens another role.
STOP_TOKENS = ("</s>", "<|user|>", "<|observation|>")

# How the Japanese model is trained: as the merged tokenizer will see text.
TRAINER_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    # The base does not normalise; pieces of normalised characters would never match raw text.
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    # The base splits numbers into digits.
    "split_digits": True,
    # Characters without a piece are spelled in bytes, as in the base.
    "byte_fallback": True,
    # Japanese words mix scripts (食べる, お金): a piece may hold kana and kanji.
    "split_by_unicode_script": False,
    # Documents can be one long line; sentencepiece's default drops lines over 4192 bytes.
    "max_sentence_length": 1_000_000,
    # As the base's trainer, so that an overlong piece cannot take the place of several words.
    "max_sentencepiece_length": 16,
}

CHAT_TEMPLATE = """\
[gMASK]sop{% for message in messages %}<|{{ message['role'] }}|>{{ message.get('metadata', '') }}
{% if message['content'] %} {{ message['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def train(
    texts: Iterable[str],
    output_dir: Path,
    *,
    vocab_size: int,
    character_coverage: float,
    num_threads: int,
    input_sentence_size: int,
) -> None:
    """Train a sentencepiece BPE model on lines of text; writes ja_bpe.model and ja_bpe.vocab.

    Line breaks end a training sentence: no piece ever spans two lines. Raises DataError when
    the texts are too few for `vocab_size`.
    """
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    first = next(lines, None)
    if first is None:
        raise DataError("the Japanese sources hold no text: nothing can be learned from them")
    failure: list[BaseException] = []

    def guarded() -> Iterator[str]:
        """sentencepiece turns an exception of its iterator into one of its own: keep it."""
        try:
            yield first
            yield from lines
        except BaseException as error:
            failure.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            num_threads=num_threads,
            input_sentence_size=input_sentence_size,
            shuffle_input_sentence=input_sentence_size > 0,
            minloglevel=2,
            **TRAINER_SETTINGS,
        )
    except RuntimeError as error:
        if failure:
            raise failure[0] from None
        reason = str(error).splitlines()[-1].strip()
        raise DataError(
            f"sentencepiece could not learn {vocab_size} pieces from this text ({reason}): give "
            "more text or lower --vocab-size"
        ) from None
    (output_dir / JA_MODEL_FILE).write_bytes(model.getvalue())
    proto = parse_model(model.getvalue(), output_dir / JA_MODEL_FILE)
    vocab = "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in proto.pieces)
    (output_dir / "ja_bpe.vocab").write_text(vocab, encoding="utf-8")


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
        raise DataError(f"{origin} is not a BPE model: expected one trained with model_type=bpe")
    return proto


def read_model(path: Path) -> Any:
    try:
        return parse_model(path.read_bytes(), path)
    except FileNotFoundError:
        raise DataError(f"{path} not found: expected a sentencepiece model") from None


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of a folder, for encoding: text never becomes a special token with it."""
    return processor(read_model(path / MODEL_FILE))


def processor(proto: Any, dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A processor of a ModelProto; without the dummy prefix it encodes as inside a text."""
    if not dummy_prefix:
        copy = type(proto)()
        copy.CopyFrom(proto)
        copy.normalizer_spec.add_dummy_prefix = False
        proto = copy
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


# --- Merging -----------------------------------------------------------------------------------


def has_kana(piece: str) -> bool:
    """Whether a piece holds a hiragana or katakana letter or the long-vowel mark, of any width."""
    return any(
        "\u3041" <= c <= "\u309f" or "\u30a1" <= c <= "\u30fa" or "\u30fc" <= c <= "\u30ff"
        or "\u31f0" <= c <= "\u31ff" or "\uff66" <= c <= "\uff9d"
        for c in piece
    )  # fmt: skip


def has_han(piece: str) -> bool:
    return any(
        "\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" or c == "\u3005" for c in piece
    )


def _encodable(character: str, codec: str) -> bool:
    try:
        character.encode(codec)
    except UnicodeEncodeError:
        return False
    return True


def has_japanese_kanji(piece: str) -> bool:
    """Whether a piece holds a kanji of JIS X 0208 that is in neither GB 2312 nor Big5 (込, 働).

    Python's shift_jis codec covers JIS X 0208 and no kanji beyond it (euc_jp adds JIS X 0212).
    """
    return any(
        has_han(c)
        and _encodable(c, "shift_jis")
        and not _encodable(c, "gb2312")
        and not _encodable(c, "big5")
        for c in piece
    )


POLICIES: dict[str, Callable[[str], bool]] = {
    "japanese": lambda piece: has_kana(piece) or has_japanese_kanji(piece),
    "kana": has_kana,
    "han": lambda piece: has_kana(piece) or has_han(piece),
    "all": lambda piece: True,
}


@dataclass
class Merge:
    """A merged model and what became of every Japanese piece."""

    proto: Any
    added: list[str]
    known: int  # already in the base
    outside_policy: int
    unspellable: list[str]  # a character has no piece of its own, so no merge can start there
    unreachable: list[str]  # no text encodes to it: the base's merges take its parts first

    def counts(self) -> dict[str, int]:
        return {
            "base_pieces": len(self.proto.pieces) - len(self.added) - len(SPECIAL_TOKENS),
            "added": len(self.added),
            "already_known": self.known,
            "outside_policy": self.outside_policy,
            "unspellable": len(self.unspellable),
            "unreachable": len(self.unreachable),
            "vocabulary": len(self.proto.pieces),
        }


def merge(base: Any, japanese: Any, policy: str) -> Merge:
    """Append the pieces of `japanese` (ModelProto) that `policy` admits to `base` (ModelProto).

    Pieces that could never be produced are left out, except under `all`, which keeps and only
    reports them. Leaving one out can make another unreachable, so it repeats until none is left.
    """
    known_pieces = {piece.piece for piece in base.pieces}
    candidates = [p.piece for p in japanese.pieces if p.type == p.NORMAL]
    new = [piece for piece in candidates if piece not in known_pieces]
    chosen = [piece for piece in new if POLICIES[policy](piece)]
    # Single characters first: every longer piece is merged from them.
    single = {piece for piece in known_pieces.union(chosen) if len(piece) == 1}
    unspellable = [piece for piece in chosen if not single.issuperset(piece)]
    unreachable: list[str] = []
    if policy == "all":
        proto = with_special_tokens(base, chosen)
        unreachable = _unreachable(proto, chosen)
    else:
        left_out = set(unspellable)
        while True:
            kept = [piece for piece in chosen if piece not in left_out]
            proto = with_special_tokens(base, kept)
            dead = _unreachable(proto, kept)
            if not dead:
                break
            unreachable += dead
            left_out.update(dead)
        chosen = kept
    outside = len(new) - sum(map(POLICIES[policy], new))
    return Merge(proto, chosen, len(candidates) - len(new), outside, unspellable, unreachable)


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


def _unreachable(proto: Any, pieces: list[str]) -> list[str]:
    """The pieces that no text encodes to.

    When a piece appears in a text, no merge crossed its borders, so the merges inside it were
    those of the piece alone: it is reachable if and only if it encodes to itself. The dummy
    prefix is switched off for that, because a piece can stand anywhere.
    """
    encoder = processor(proto, dummy_prefix=False)
    # sentencepiece reads its own mark of a space as one.
    encoded = encoder.encode(pieces)
    return [
        piece
        for piece, ids in zip(pieces, encoded, strict=True)
        if len(ids) != 1 or encoder.id_to_piece(ids[0]) != piece
    ]


def check_base(proto: Any, padded_vocab_size: int, origin: Path) -> None:
    """Refuse a base whose embedding has no rows for the nine special tokens after its pieces."""
    if proto.normalizer_spec.precompiled_charsmap:
        raise DataError(f"{origin} normalises text, which ChatGLM3's does not: wrong base model?")
    taken = [piece.piece for piece in proto.pieces if piece.piece in SPECIAL_TOKENS]
    if taken:
        raise DataError(f"{origin} holds {', '.join(taken)} as pieces: it is merged already")
    needed = len(proto.pieces) + len(SPECIAL_TOKENS)
    if padded_vocab_size < needed:
        raise DataError(
            f"{origin} has {len(proto.pieces)} pieces and needs {needed} ids with the special "
            f"tokens, but config.json has padded_vocab_size {padded_vocab_size}"
        )


# --- Export ------------------------------------------------------------------------------------


def save(proto: Any, folder: Path) -> None:
    """Write a merged model as a folder that `AutoTokenizer.from_pretrained` loads.

    tokenizer.model is for sentencepiece and for the pipeline; tokenizer.json is the same BPE for
    the `tokenizers` library. There, as everywhere in that ecosystem, a text that spells a
    special token becomes it unless `split_special_tokens=True`.
    """
    (folder / MODEL_FILE).write_bytes(proto.SerializeToString())
    _fast_tokenizer(proto).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _fast_tokenizer(proto: Any) -> Any:
    """The same BPE for the `tokenizers` library.

    sentencepiece merges any adjacent pair whose concatenation is a piece, best score first. The
    merge list therefore holds every split of every piece into two pieces, ordered by score.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    mergeable = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = []
    for piece, score in mergeable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-score, vocab[left], vocab[right], left, right))
    merges.sort()
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    names = ("<unk>", "<s>", "</s>", *SPECIAL_TOKENS)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def copy_files(source: Path, target: Path) -> None:
    """Put the files that `save` wrote into a model folder, too."""
    for name in FILES:
        shutil.copyfile(source / name, target / name)


# --- Comparing ---------------------------------------------------------------------------------


@dataclass
class Segmentation:
    """How two tokenizers cut the same lines."""

    lines: int = 0
    identical: int = 0
    characters: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    # Lines that no added piece can occur in, and that are segmented differently all the same.
    broken: list[str] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        characters = max(self.characters, 1)
        return {
            "lines": self.lines,
            "identical_share": self.identical / max(self.lines, 1),
            "tokens_per_char_before": self.tokens_before / characters,
            "tokens_per_char_after": self.tokens_after / characters,
        }


def compare(before: Any, after: Any, texts: Iterable[str], policy: str) -> Segmentation:
    """Encode every line of the texts with both processors; `after` keeps the ids of `before`.

    Every piece that a policy adds holds one of the policy's characters (kana, for example), so
    a line without any of them has to keep its ids; one that does not is noted in `broken`.
    """
    result = Segmentation()
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        for line, old, new in zip(lines, before.encode(lines), after.encode(lines), strict=True):
            result.lines += 1
            result.identical += old == new
            if old != new and not POLICIES[policy](line):
                result.broken.append(line)
            result.characters += len(line)
            result.tokens_before += len(old)
            result.tokens_after += len(new)
    return result


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
