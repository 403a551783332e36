"""The vocabulary merge: what stays, what is added, and that both libraries agree on the result."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chatglm_ja import tokenizer
from chatglm_ja.errors import DataError
from tests.conftest import SHARED, demo_texts, needs_real_tokenizer

ODD_TEXTS = [
    "", " ", "  two  spaces ", "\ttab\n\nlines\r\n", "😀👩‍👩‍👧‍👧 絵文字", "か\u3099 が",
    "ﾊﾝｶｸ ＦＵＬＬ", "1998年12月31日", "▁mark", "込働気図", "\u0000\u0007", "\U0010ffff", "𠮷野家",
    "..." * 50,
]  # fmt: skip


def test_old_ids_and_special_tokens_keep_their_places(base_proto: Any, merge: Any) -> None:
    old = len(base_proto.pieces)
    pieces = [piece.piece for piece in merge.proto.pieces]
    assert pieces[:old] == [piece.piece for piece in base_proto.pieces]
    assert tuple(pieces[old : old + 9]) == tokenizer.SPECIAL_TOKENS
    assert pieces[old + 9 :] == merge.added
    assert len(merge.added) > 500


def test_chinese_and_english_are_segmented_as_before(base_proto: Any, merge: Any) -> None:
    before = tokenizer.processor(base_proto)
    after = tokenizer.processor(merge.proto)
    for language in ("zh", "en"):
        result = tokenizer.compare(before, after, demo_texts(language, 300), "japanese")
        assert result.lines > 1000
        assert result.identical == result.lines
        assert not result.broken
    japanese = tokenizer.compare(before, after, demo_texts("ja", 80, "heldout"), "japanese")
    assert japanese.tokens_after < 0.8 * japanese.tokens_before


def test_a_broken_promise_is_noticed(base_proto: Any) -> None:
    """A piece without kana, as the article's merge adds them, changes a Chinese line."""
    before = tokenizer.processor(base_proto)
    piece = "".join(before.encode("打开文件夹。", out_type=str)[-2:])
    assert before.piece_to_id(piece) == tokenizer.UNK_ID
    after = tokenizer.processor(tokenizer.with_special_tokens(base_proto, [piece]))
    texts = ["打开文件夹。\nin the other\nひらがな。"]
    result = tokenizer.compare(before, after, texts, "japanese")
    assert result.lines == 3
    assert result.broken == ["打开文件夹。"]
    assert not tokenizer.compare(before, after, texts, "all").broken


def test_every_new_piece_is_produced_by_a_text(merge: Any) -> None:
    encoder = tokenizer.processor(merge.proto, dummy_prefix=False)
    for piece in merge.added:
        assert encoder.encode(piece.replace("▁", " "), out_type=str) == [piece]


def test_no_text_becomes_a_special_token(encoder: Any) -> None:
    for token in (*tokenizer.SPECIAL_TOKENS, "<s>", "</s>", "<unk>"):
        ids = encoder.encode(f"a {token} b{token}")
        assert not any(encoder.is_control(index) or encoder.is_unknown(index) for index in ids)
        assert encoder.decode(ids) == f"a {token} b{token}"


def test_auto_tokenizer_gives_the_same_ids_and_texts(merged_dir: Path, encoder: Any) -> None:
    fast = AutoTokenizer.from_pretrained(merged_dir)
    assert len(fast) == encoder.get_piece_size()
    lines = [
        line
        for language in ("ja", "zh", "en")
        for text in demo_texts(language, 80, "heldout")
        for line in text.split("\n")
    ]
    for text in [*lines, *ODD_TEXTS]:
        ids = fast(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == encoder.encode(text), text
        # To sentencepiece its own mark of a space is a space.
        assert fast.decode(ids) == encoder.decode(ids) == text.replace("▁", " ")


def test_auto_tokenizer_knows_the_special_tokens(merged_dir: Path, encoder: Any) -> None:
    fast = AutoTokenizer.from_pretrained(merged_dir)
    for token in (*tokenizer.SPECIAL_TOKENS, "<s>", "</s>"):
        assert fast.convert_tokens_to_ids(token) == encoder.piece_to_id(token)
    assert (fast.eos_token_id, fast.pad_token_id, fast.padding_side) == (2, 0, "left")


@pytest.mark.parametrize(
    ("piece", "kana", "japanese", "han"),
    [
        ("です", True, True, True),
        ("ﾃｽﾄ", True, True, True),
        ("込", False, True, True),
        ("中国", False, False, True),
        ("線", False, False, True),
        ("the", False, False, False),
        ("・", False, False, False),
    ],
)
def test_policies(piece: str, kana: bool, japanese: bool, han: bool) -> None:
    admitted = {name: admits(piece) for name, admits in tokenizer.POLICIES.items()}
    assert admitted == {"kana": kana, "japanese": japanese, "han": han, "all": True}


def test_a_merged_tokenizer_is_refused_as_base(merge: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="merged already"):
        tokenizer.check_base(merge.proto, 100_000, tmp_path)


def test_a_base_without_room_for_the_special_tokens_is_refused(
    base_proto: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="padded_vocab_size 4008"):
        tokenizer.check_base(base_proto, 4008, tmp_path)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x00" * 100])
def test_rubbish_is_no_sentencepiece_model(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        tokenizer.parse_model(data, tmp_path / "x.model")


def test_no_text_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold no text"):
        tokenizer.train(
            ["", " \n "],
            tmp_path,
            vocab_size=5000,
            character_coverage=1.0,
            num_threads=1,
            input_sentence_size=0,
        )


def test_a_bad_record_in_the_corpus_keeps_its_own_words(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield from demo_texts("ja", 50)
        raise DataError("a.jsonl line 51 is not JSON")

    with pytest.raises(DataError, match="line 51 is not JSON"):
        tokenizer.train(
            texts(),
            tmp_path,
            vocab_size=1000,
            character_coverage=1.0,
            num_threads=1,
            input_sentence_size=0,
        )


def test_too_little_text_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not learn 5000 pieces"):
        tokenizer.train(
            ["あいうえお"],
            tmp_path,
            vocab_size=5000,
            character_coverage=1.0,
            num_threads=1,
            input_sentence_size=0,
        )
    assert not list(tmp_path.iterdir())


@needs_real_tokenizer
class TestRealTokenizer:
    """Against ChatGLM3-6B's own tokenizer and the article's Japanese model."""

    @pytest.fixture(scope="class")
    def protos(self) -> tuple[Any, Any]:
        return (
            tokenizer.read_model(SHARED / "chatglm3-6b" / "tokenizer.model"),
            tokenizer.read_model(SHARED / "reference" / "ja_bpe.model"),
        )

    def test_policy_all_adds_what_the_article_added(self, protos: tuple[Any, Any]) -> None:
        merged = tokenizer.merge(*protos, "all")
        assert len(merged.added) == 13_756
        assert len(merged.proto.pieces) == 78_554
        assert merged.unreachable

    def test_the_articles_sample_takes_at_most_67_tokens(self, protos: tuple[Any, Any]) -> None:
        sample = (SHARED / "parity" / "sample_ja.txt").read_text(encoding="utf-8").rstrip("\n")
        merged = tokenizer.merge(*protos, "japanese")
        assert len(tokenizer.processor(protos[0]).encode(sample)) == 125
        assert len(tokenizer.processor(merged.proto).encode(sample)) <= 67

    def test_held_out_chinese_and_english_stay(self, protos: tuple[Any, Any]) -> None:
        merged = tokenizer.merge(*protos, "japanese")
        before, after = map(tokenizer.processor, (protos[0], merged.proto))
        for language in ("zh", "en"):
            result = tokenizer.compare(before, after, demo_texts(language, 1000), "japanese")
            assert result.identical == result.lines
