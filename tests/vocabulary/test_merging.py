"""Policies, learning pieces, and merging them: what is kept, added and dropped, and why."""

import hashlib
import itertools
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.chatglm3.base import Base
from chatglm_ja.data import corpus
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary import learning, merging, policies, segmentation
from chatglm_ja.vocabulary.policies import Policy
from tests.conftest import PROJECT, SHARED, TRAINER_SETTINGS, demo_texts, needs_real_tokenizer


def train(texts: Any, vocab_size: int = 2500, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "character_coverage": 0.9995, "num_threads": 1, "settings": TRAINER_SETTINGS, **changes
    }  # fmt: skip
    return learning.train_sentencepiece(
        corpus.training_lines(texts, {}), vocab_size=vocab_size, **settings
    )


def model_of(base_proto: Any, *pieces: str) -> Any:
    """Make a learned model with these pieces only."""
    proto = type(base_proto)()
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.NORMAL)
    return proto


# --- Policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("piece", "admitted_by"),
    [
        ("です", "kana japanese han letters"),
        ("ﾃｽﾄ", "kana japanese han letters"),
        ("込", "japanese han"),
        ("働", "japanese han"),
        ("気図", "japanese han"),
        ("中国", "han"),
        ("線", "han"),
        ("한국어", "letters"),
        ("▁не", "letters"),
        ("ไทย", "letters"),
        ("straße", "letters"),
        ("the", ""),
        ("ＡＢＣ", ""),
        ("ึ", "letters"),  # a vowel sign of Thai, alone
        ("é", "letters"),
        ("é", ""),  # an accent that any script may use
        ("❤️", ""),
        ("1998", ""),
        ("m²", ""),
        ("Ⅷ", ""),
        ("①", ""),
        ("二〇", "han"),
        ("𠮷", ""),  # Han, beyond the planes that the other policies look at
        ("・", ""),
    ],
)
def test_policies(piece: str, admitted_by: str) -> None:
    admitted = {policy for policy in Policy if policy.admits(piece)}
    assert admitted == {*admitted_by.split(), "all"}


def test_standard_chinese_has_no_japanese_kanji() -> None:
    """Decode every Han character of GB 2312 and Big5 from the code points of the standards."""
    gb2312 = bytes_of(range(0xB0, 0xF8), range(0xA1, 0xFF), "gb2312")
    big5 = bytes_of(range(0xA4, 0xFA), (*range(0x40, 0x7F), *range(0xA1, 0xFF)), "big5")
    assert len(gb2312) == 6763 and len(big5) > 13_000
    han = "".join(c for c in gb2312 + big5 if unicodedata.name(c, "").startswith("CJK"))
    assert len(set(han)) > 15_000
    assert not Policy.JAPANESE.admits(han)
    assert len(policies.japanese_kanji()) > 300


def bytes_of(high: Any, low: Any, codec: str) -> str:
    cells = (bytes([first, second]) for first in high for second in low)
    return "".join(cell.decode(codec, errors="ignore") for cell in cells)


# --- Step 1 --------------------------------------------------------------------------------------


def test_training_does_not_depend_on_threads_or_the_process() -> None:
    """The fingerprinted bytes must be the same on every machine."""
    script = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from tests.vocabulary.test_merging import train, demo_texts\n"
        "proto = train(demo_texts('ja', 60), num_threads=int(sys.argv[2]))\n"
        "print(hashlib.sha256(proto.SerializeToString()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(PROJECT), threads],
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "3")
    }  # fmt: skip
    here = hashlib.sha256(train(demo_texts("ja", 60)).SerializeToString()).hexdigest()
    assert digests == {here + "\n"}


def test_learned_pieces_fit_the_base(ja_dir: Path) -> None:
    proto = learning.read_learned(ja_dir)
    assert proto.normalizer_spec.name == "identity"
    assert not proto.normalizer_spec.precompiled_charsmap
    assert len(proto.pieces) == 2500
    pieces = [piece.piece for piece in proto.pieces if piece.type == piece.NORMAL]
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces)
    assert sum(piece.type == piece.BYTE for piece in proto.pieces) == 256
    assert max(map(len, pieces)) <= 16
    vocab = (ja_dir / "ja_bpe.vocab").read_text(encoding="utf-8")
    assert [line.split("\t")[0] for line in vocab.split("\n")[:-1]] == [
        piece.piece for piece in proto.pieces
    ]


def test_an_error_of_the_corpus_is_raised_unchanged() -> None:
    def texts() -> Iterator[str]:
        yield from demo_texts("ja", 50)
        raise DataError("a.jsonl line 51 is not JSON")

    with pytest.raises(DataError, match="line 51 is not JSON"):
        train(texts())


def test_too_little_text_is_refused(base_proto: Any) -> None:
    with pytest.raises(DataError, match=r"could not learn 5000 pieces .*Vocabulary size too high"):
        train(["あいうえお"], vocab_size=5000)
    with pytest.raises(DataError, match=r"gives \d+ pieces, expected 5000"):
        continued(base_proto, ["あいうえお"], 5000)


# --- Step 1, continuing the base -----------------------------------------------------------------


def continued(
    base_proto: Any, texts: list[str], vocab_size: int, policy: Policy = Policy.JAPANESE
) -> Any:
    return learning.continue_merges(
        base_proto,
        corpus.training_lines(texts, {}),
        policy,
        vocab_size=vocab_size,
        character_coverage=0.9995,
        num_threads=2,
        max_piece_length=16,
    )


def test_continuing_drops_no_piece_and_compresses_better(
    base_proto: Any, merge: merging.MergedVocabulary
) -> None:
    """With as many new pieces from the same text, held-out Japanese has fewer tokens."""
    control_and_bytes = 3 + 256
    size = control_and_bytes + len(merge.added)
    learned = continued(base_proto, demo_texts("ja", 300), size)
    assert len(learned.pieces) == size
    from_base = merging.merge_pieces(base_proto, learned, Policy.JAPANESE)
    assert len(from_base.added) == len(merge.added)
    assert not any(from_base.dropped.values())
    texts = demo_texts("ja", 80, "heldout")
    tokens = [
        sum(map(len, tokenizer.make_processor(m.proto).encode(texts))) for m in (merge, from_base)
    ]
    assert tokens[1] < tokens[0]


@pytest.mark.parametrize("policy", Policy)
def test_continuing_learns_only_what_the_policy_admits(base_proto: Any, policy: Policy) -> None:
    learned = continued(base_proto, demo_texts("ja", 40), 259 + 300, policy)
    merged = merging.merge_pieces(base_proto, learned, policy)
    assert len(merged.added) == 300


# --- Step 2 --------------------------------------------------------------------------------------


def test_old_ids_and_special_tokens_keep_their_places(base_proto: Any, merge: Any) -> None:
    old = len(base_proto.pieces)
    pieces = [piece.piece for piece in merge.proto.pieces]
    assert pieces[:old] == [piece.piece for piece in base_proto.pieces]
    assert tuple(pieces[old : old + 9]) == tokenizer.SPECIAL_TOKENS
    assert pieces[old + 9 :] == merge.added
    assert len(merge.added) > 500


def test_new_pieces_rank_below_the_base_in_the_order_learned(base_proto: Any, merge: Any) -> None:
    scores = [piece.score for piece in merge.proto.pieces[-len(merge.added) :]]
    assert scores[0] < min(piece.score for piece in base_proto.pieces)
    assert all(later < earlier for earlier, later in itertools.pairwise(scores))


def test_every_new_piece_is_produced_by_a_text(merge: Any) -> None:
    encoder = tokenizer.make_processor(merge.proto, dummy_prefix=False)
    for piece in merge.added:
        assert encoder.encode(piece.replace("▁", " "), out_type=str) == [piece]


def test_dropped_pieces_are_listed_by_reason(base_proto: Any) -> None:
    base = tokenizer.make_processor(base_proto)
    known = next(p.piece for p in base_proto.pieces if p.type == p.NORMAL and len(p.piece) > 1)
    assert base.piece_to_id("閠") == tokenizer.UNK_ID  # no piece of its own
    # No piece merges かね or ますか, so ますかね is unreachable.
    pieces = [*"のますかね", "ます"]
    japanese = model_of(base_proto, known, "qzxq", "閠の", *pieces, "ますかね")
    merged = merging.merge_pieces(base_proto, japanese, Policy.JAPANESE)
    assert merged.added == pieces
    assert merged.dropped == {
        "already_known": [known],
        "outside_policy": ["qzxq"],
        "unspellable": ["閠の"],
        "unreachable": ["ますかね"],
    }
    assert merged.counts()["unreachable"] == 1
    everything = merging.merge_pieces(base_proto, japanese, Policy.ALL)
    assert everything.added == ["qzxq", "閠の", *pieces, "ますかね"]
    assert everything.dropped["unspellable"] == ["閠の"]
    assert "ますかね" in everything.dropped["unreachable"]


def test_a_limit_keeps_the_pieces_that_are_used_most(base_proto: Any, ja_dir: Path) -> None:
    learned = learning.read_learned(ja_dir)
    texts = demo_texts("ja", 100)
    full = merging.merge_pieces(base_proto, learned, Policy.JAPANESE)
    limit = len(full.added) // 2
    best = merging.merge_pieces(
        base_proto, learned, Policy.JAPANESE, max_new_pieces=limit, ranking_texts=texts
    )
    assert len(best.added) == limit
    assert best.added == [piece for piece in full.added if piece in set(best.added)]
    assert set(best.dropped["past_max_new_pieces"]) == set(full.added) - set(best.added)
    encoder = tokenizer.make_processor(best.proto, dummy_prefix=False)
    assert encoder.encode(best.added, out_type=str) == [[piece] for piece in best.added]

    def tokens(pieces: list[str]) -> int:
        proto = tokenizer.add_special_tokens(base_proto, pieces)
        return sum(map(len, tokenizer.make_processor(proto).encode(texts)))

    # The most used half saves more than 80% of the tokens, and more than the first half learned.
    none, half, every = tokens([]), tokens(best.added), tokens(full.added)
    assert none - half > 0.8 * (none - every)
    assert half < tokens(full.added[:limit])


def test_a_limit_under_the_policy_all(base_proto: Any) -> None:
    pieces = ["ます", *"ますかね", "ますかね"]
    arguments: dict[str, Any] = {"max_new_pieces": 3, "ranking_texts": ["ますます"]}
    merged = merging.merge_pieces(
        base_proto, model_of(base_proto, *pieces), Policy.ALL, **arguments
    )
    assert merged.added == ["ます", "ま", "す"]
    assert merged.dropped["unreachable"] == []
    assert merged.dropped["past_max_new_pieces"] == ["か", "ね", "ますかね"]
    arguments["ranking_texts"] = ["english"]
    with pytest.raises(DataError, match="hold no text that any new piece occurs in"):
        merging.merge_pieces(base_proto, model_of(base_proto, *pieces), Policy.ALL, **arguments)


def test_special_tokens_are_never_pieces(base_proto: Any) -> None:
    merged = merging.merge_pieces(
        base_proto, model_of(base_proto, "sop", "eop", "qzxq"), Policy.ALL
    )
    assert merged.added == ["qzxq"]
    assert merged.dropped["already_known"] == ["sop", "eop"]


@pytest.mark.parametrize("pieces", [["です", "です"], [""], ["で\0す"]])
def test_a_model_that_sentencepiece_refuses_is_damaged(
    pieces: list[str], ja_dir: Path, tmp_path: Path
) -> None:
    proto = learning.read_learned(ja_dir)
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.NORMAL)
    learning.save_learned(proto, tmp_path)
    with pytest.raises(DataError, match=r"ja_bpe\.model is a damaged sentencepiece model"):
        learning.read_learned(tmp_path / learning.JA_MODEL_FILE)


def test_uses_count_merges(base_proto: Any) -> None:
    pieces = [*"しますかで", "ます", "します", "しますか"]
    use = merging.count_uses(base_proto, pieces, ["します", "しますか", "ます。しますか", "です"])
    assert {piece: use[piece] for piece in pieces[5:]} == {"ます": 4, "します": 3, "しますか": 2}
    assert (use["し"], use["す"], use["で"]) == (3, 5, 1)


# --- Against ChatGLM3-6B's own tokenizer and the article's Japanese model ------------------------


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    return (
        Base.open(SHARED / "chatglm3-6b").proto,
        learning.read_learned(SHARED / "reference" / "ja_bpe.model"),
    )


@needs_real_tokenizer
def test_policy_all_adds_what_the_article_added(real: tuple[Any, Any]) -> None:
    merged = merging.merge_pieces(*real, Policy.ALL)
    assert len(merged.added) == 13_756
    assert len(merged.proto.pieces) == 78_554
    assert merged.dropped["unreachable"]


@needs_real_tokenizer
def test_the_articles_sample_takes_at_most_67_tokens(real: tuple[Any, Any]) -> None:
    sample = (SHARED / "parity" / "sample_ja.txt").read_text(encoding="utf-8").rstrip("\n")
    merged = merging.merge_pieces(*real, Policy.JAPANESE)
    assert len(tokenizer.make_processor(real[0]).encode(sample)) == 125
    assert len(tokenizer.make_processor(merged.proto).encode(sample)) <= 67


@needs_real_tokenizer
@pytest.mark.parametrize("policy", [Policy.JAPANESE, Policy.KANA])
def test_chinese_and_english_stay(real: tuple[Any, Any], policy: Policy) -> None:
    merged = merging.merge_pieces(*real, policy)
    before, after = map(tokenizer.make_processor, (real[0], merged.proto))
    for language in ("zh", "en"):
        texts = demo_texts(language, 1000)
        result = segmentation.compare_segmentation(before, after, texts, policy)
        assert result.identical == result.lines > 1000
