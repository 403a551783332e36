"""Policies, merging, and the guarantee: what is added and dropped, and how lines change."""

import itertools
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.bases.chatglm3 import ChatGLM3Base, ChatGLM3Tokenizer
from chatglm_ja.bases.sentencepiece_vocabulary import (
    LEARNED_FILE,
    ChatGLM3Vocabulary,
    save_model,
)
from chatglm_ja.chatglm3 import tokenizer, tokenizer_files
from chatglm_ja.errors import DataError
from chatglm_ja.reports import merge_report
from chatglm_ja.vocabulary import merging, policies
from chatglm_ja.vocabulary.policies import Policy
from tests.conftest import SHARED, demo_texts, needs_real_tokenizer
from tests.reports.pages import loads_nothing

# --- Policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("piece", "admitted_by"),
    [
        ("です", "kana japanese simplified han letters"),
        ("ﾃｽﾄ", "kana japanese simplified han letters"),
        ("込", "japanese simplified han"),
        ("働", "japanese simplified han"),
        ("気図", "japanese simplified han"),
        ("電", "simplified han"),  # in Big5
        ("読書", "japanese simplified han"),
        ("学校", "han"),
        ("中国", "han"),
        ("線", "simplified han"),
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


KOREAN = "오늘 날씨가 매우 좋습니다"
THAI = "ภาษาไทยเป็นภาษาราชการ"
RUSSIAN = "сегодня хорошая погода"
JAPANESE = "今日はとても天気がいいです"


@pytest.mark.parametrize("text", [KOREAN, THAI, RUSSIAN, "今天天气很好", "The weather is fine."])
@pytest.mark.parametrize("policy", [Policy.JAPANESE, Policy.SIMPLIFIED, Policy.KANA])
def test_texts_of_another_language_are_refused(policy: Policy, text: str) -> None:
    lines = [JAPANESE] + 99 * [text]
    with pytest.raises(DataError, match=f"policy {policy} admits .* pass --policy letters"):
        next(policy.probe(lines))
    with pytest.raises(DataError):
        next(policy.probe(20_000 * [text]))


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Policy.JAPANESE, JAPANESE),
        (Policy.LETTERS, JAPANESE),
        (Policy.LETTERS, KOREAN),
        (Policy.LETTERS, THAI),
        (Policy.LETTERS, RUSSIAN),
        (Policy.LETTERS, "Das Wetter ist schön."),
        (Policy.HAN, "今天天气很好"),
        (Policy.ALL, "The weather is fine."),
    ],
)
def test_texts_that_a_policy_is_for_pass_unchanged(policy: Policy, text: str) -> None:
    for lines in ([], [text], ["A title in English"] + 9 * [text], 20_000 * [text]):
        assert list(policy.probe(lines)) == lines


def test_a_policy_that_hardly_admits_a_piece_must_be_chosen(
    base_vocabulary: ChatGLM3Vocabulary,
) -> None:
    dropped = {"already_known": ["a"] * 500, "outside_policy": ["날씨"] * 99, "unreachable": []}
    merged = merging.MergedVocabulary(base_vocabulary, ["です"], dropped)
    message = r"japanese admits only 1 of 100 new pieces: .* --policy letters"
    with pytest.raises(DataError, match=message):
        merging.check_added(merged, Policy.JAPANESE, is_chosen=False)
    merging.check_added(merged, Policy.JAPANESE, is_chosen=True)
    merging.check_added(replace(merged, added=["です"] * 11), Policy.JAPANESE, is_chosen=False)
    with pytest.raises(DataError, match="none of the pieces is new"):
        merging.check_added(replace(merged, added=[]), Policy.JAPANESE, is_chosen=True)


def test_standard_chinese_has_no_japanese_kanji() -> None:
    """Decode every Han character of GB 2312 and Big5 from the code points of the standards."""
    gb2312 = bytes_of(range(0xB0, 0xF8), range(0xA1, 0xFF), "gb2312")
    big5 = bytes_of(range(0xA4, 0xFA), (*range(0x40, 0x7F), *range(0xA1, 0xFF)), "big5")
    assert len(gb2312) == 6763 and len(big5) > 13_000
    han = "".join(c for c in gb2312 + big5 if unicodedata.name(c, "").startswith("CJK"))
    assert len(set(han)) > 15_000
    assert not Policy.JAPANESE.admits(han) and not Policy.SIMPLIFIED.admits(gb2312)
    few, more = policies.japanese_kanji("gb2312", "big5"), policies.japanese_kanji("gb2312")
    assert 300 < len(few) < len(more) and {*few} < {*more}


def bytes_of(high: Any, low: Any, codec: str) -> str:
    cells = (bytes([first, second]) for first in high for second in low)
    return "".join(cell.decode(codec, errors="ignore") for cell in cells)


def tokenizer_of(merged: merging.MergedVocabulary) -> ChatGLM3Tokenizer:
    assert isinstance(merged.vocabulary, ChatGLM3Vocabulary)
    return ChatGLM3Tokenizer(merged.vocabulary.proto)


# --- Step 2 --------------------------------------------------------------------------------------


def test_old_ids_and_special_tokens_keep_their_places(
    base_proto: Any, merged_proto: Any, merge: merging.MergedVocabulary
) -> None:
    old = len(base_proto.pieces)
    pieces = [piece.piece for piece in merged_proto.pieces]
    assert pieces[:old] == [piece.piece for piece in base_proto.pieces]
    assert tuple(pieces[old : old + 9]) == tokenizer.SPECIAL_TOKENS
    assert pieces[old + 9 :] == merge.added
    assert len(merge.added) > 500


def test_new_pieces_rank_below_the_base_in_the_order_learned(
    base_proto: Any, merged_proto: Any, merge: merging.MergedVocabulary
) -> None:
    scores = [piece.score for piece in merged_proto.pieces[-len(merge.added) :]]
    assert scores[0] < min(piece.score for piece in base_proto.pieces)
    assert all(later < earlier for earlier, later in itertools.pairwise(scores))


def test_every_new_piece_is_produced_by_a_text(
    merged_proto: Any, merge: merging.MergedVocabulary
) -> None:
    encoder = tokenizer.make_processor(merged_proto, dummy_prefix=False)
    for piece in merge.added:
        assert encoder.encode(piece.replace("▁", " "), out_type=str) == [piece]


def test_dropped_pieces_are_listed_by_reason(
    base_proto: Any, base_vocabulary: ChatGLM3Vocabulary
) -> None:
    base = tokenizer.make_processor(base_proto)
    known = next(p.piece for p in base_proto.pieces if p.type == p.NORMAL and len(p.piece) > 1)
    assert base.piece_to_id("閠") == tokenizer.UNK_ID  # no piece of its own
    # No piece merges かね or ますか, so ますかね is unreachable.
    pieces = [*"のますかね", "ます"]
    japanese = [known, "qzxq", "閠の", *pieces, "ますかね"]
    merged = merging.merge_pieces(base_vocabulary, japanese, Policy.JAPANESE)
    assert merged.added == pieces
    assert merged.dropped == {
        "already_known": [known],
        "outside_policy": ["qzxq"],
        "unspellable": ["閠の"],
        "unreachable": ["ますかね"],
    }
    assert merged.counts()["unreachable"] == 1
    everything = merging.merge_pieces(base_vocabulary, japanese, Policy.ALL)
    assert everything.added == ["qzxq", "閠の", *pieces, "ますかね"]
    assert everything.dropped["unspellable"] == ["閠の"]
    assert "ますかね" in everything.dropped["unreachable"]


def test_a_limit_keeps_the_pieces_that_are_used_most(
    base_proto: Any, base_vocabulary: ChatGLM3Vocabulary, ja_dir: Path
) -> None:
    learned = base_vocabulary.read_learned(ja_dir)
    texts = demo_texts("ja", 100)
    full = merging.merge_pieces(base_vocabulary, learned, Policy.JAPANESE)
    limit = len(full.added) // 2
    best = merging.merge_pieces(
        base_vocabulary, learned, Policy.JAPANESE, max_new_pieces=limit, ranking_texts=texts
    )
    assert len(best.added) == limit
    assert best.added == [piece for piece in full.added if piece in set(best.added)]
    assert set(best.dropped["past_max_new_pieces"]) == set(full.added) - set(best.added)
    assert best.vocabulary.segment(best.added) == [[piece] for piece in best.added]

    def tokens(pieces: list[str]) -> int:
        proto = tokenizer.add_special_tokens(base_proto, pieces)
        return sum(map(len, tokenizer.make_processor(proto).encode(texts)))

    # The most used half saves more than 80% of the tokens, and more than the first half learned.
    none, half, every = tokens([]), tokens(best.added), tokens(full.added)
    assert none - half > 0.8 * (none - every)
    assert half < tokens(full.added[:limit])


def test_a_limit_under_the_policy_all(base_vocabulary: ChatGLM3Vocabulary) -> None:
    pieces = ["ます", *"ますかね", "ますかね"]
    arguments: dict[str, Any] = {"max_new_pieces": 3, "ranking_texts": ["ますます"]}
    merged = merging.merge_pieces(base_vocabulary, pieces, Policy.ALL, **arguments)
    assert merged.added == ["ます", "ま", "す"]
    assert merged.dropped["unreachable"] == []
    assert merged.dropped["past_max_new_pieces"] == ["か", "ね", "ますかね"]
    arguments["ranking_texts"] = ["english"]
    with pytest.raises(DataError, match="hold no text that any new piece occurs in"):
        merging.merge_pieces(base_vocabulary, pieces, Policy.ALL, **arguments)


def test_special_tokens_are_never_pieces(base_vocabulary: ChatGLM3Vocabulary) -> None:
    merged = merging.merge_pieces(base_vocabulary, ["sop", "eop", "qzxq"], Policy.ALL)
    assert merged.added == ["qzxq"]
    assert merged.dropped["already_known"] == ["sop", "eop"]


@pytest.mark.parametrize("pieces", [["です", "です"], [""], ["で\0す"]])
def test_a_model_that_sentencepiece_refuses_is_damaged(
    pieces: list[str], ja_dir: Path, base_vocabulary: ChatGLM3Vocabulary, tmp_path: Path
) -> None:
    proto = tokenizer.read_proto(ja_dir / LEARNED_FILE)
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.NORMAL)
    save_model(proto, tmp_path)
    with pytest.raises(DataError, match=r"ja_bpe\.model is a damaged sentencepiece model"):
        base_vocabulary.read_learned(tmp_path / LEARNED_FILE)


def test_uses_count_merges(base_vocabulary: ChatGLM3Vocabulary) -> None:
    pieces = [*"しますかで", "ます", "します", "しますか"]
    texts = ["します", "しますか", "ます。しますか", "です"]
    use = merging.count_uses(base_vocabulary, pieces, texts)
    assert {piece: use[piece] for piece in pieces[5:]} == {"ます": 4, "します": 3, "しますか": 2}
    assert (use["し"], use["す"], use["で"]) == (3, 5, 1)


# --- Segmentation and the report -----------------------------------------------------------------


@pytest.fixture
def before(base_dir: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Base.open(base_dir).tokenizer


def test_chinese_and_english_are_segmented_as_before(
    before: ChatGLM3Tokenizer, merged_dir: Path
) -> None:
    after = ChatGLM3Tokenizer.open(merged_dir)
    for language in ("zh", "en"):
        result = merging.compare_segmentation(
            before, after, demo_texts(language, 300), Policy.JAPANESE
        )
        assert result.lines > 1000
        # One Chinese page quotes Japanese numerals (壱弐参): the only line that may change.
        assert result.covered >= result.lines - 1
        assert result.identical >= result.covered and not result.broken
    texts = demo_texts("ja", 80, "heldout")
    japanese = merging.compare_segmentation(before, after, texts, Policy.JAPANESE)
    assert japanese.tokens_after < 0.8 * japanese.tokens_before
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    ids = [index for line in lines for index in after.encode(line)]
    new = [index for index in ids if index >= before.size]
    assert japanese.used == set(new)
    assert japanese.row()["new_token_share"] == len(new) / len(ids)
    merging.check_guarantee({"ja": japanese}, Policy.JAPANESE)


def test_a_broken_guarantee_is_an_error(base_proto: Any, before: ChatGLM3Tokenizer) -> None:
    """A piece without kana, such as the article's merge adds, changes a Chinese line."""
    piece = "".join(before.spell("打开文件夹。")[-2:])
    assert piece not in before.pieces
    after = ChatGLM3Tokenizer(tokenizer.add_special_tokens(base_proto, [piece]))
    texts = ["打开文件夹。\nin the other\nひらがな。"]
    result = merging.compare_segmentation(before, after, texts, Policy.JAPANESE)
    assert result.lines == 3 and result.covered == 2
    assert result.broken == result.changed == ["打开文件夹。"]
    with pytest.raises(DataError, match="1 zh lines that the policy japanese must not change"):
        merging.check_guarantee({"zh": result}, Policy.JAPANESE)
    result = merging.compare_segmentation(before, after, texts, Policy.ALL)
    assert result.changed and not result.broken
    merging.check_guarantee({"zh": result}, Policy.ALL)


def test_a_tokenizer_json_that_differs_is_an_error(
    before: ChatGLM3Tokenizer, merged_proto: Any
) -> None:
    after = ChatGLM3Tokenizer(merged_proto)
    right = tokenizer_files.make_line_encoder(merged_proto)
    result = merging.compare_segmentation(before, after, ["あ\nです"], Policy.JAPANESE, rust=right)
    assert result.rust_differs == []
    result = merging.compare_segmentation(
        before,
        after,
        ["あ\nです"],
        Policy.JAPANESE,
        rust=lambda lines: [ids[:-1] for ids in right(lines)],
    )
    assert result.rust_differs == ["あ", "です"]
    with pytest.raises(DataError, match=r"other ids than tokenizer\.model for 2 ja lines"):
        merging.check_guarantee({"ja": result}, Policy.JAPANESE)


def test_a_line_that_no_longer_decodes_to_itself_is_an_error(
    before: ChatGLM3Tokenizer, merged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = ChatGLM3Tokenizer.open(merged_dir)
    monkeypatch.setattr(after, "decode", lambda ids: "です ")
    result = merging.compare_segmentation(before, after, ["です\nabc"], Policy.JAPANESE)
    assert result.lossy == ["です"]
    with pytest.raises(DataError, match="1 ja lines would not decode to themselves any more"):
        merging.check_guarantee({"ja": result}, Policy.JAPANESE)


def test_no_new_pieces_is_a_limit_as_well(
    base_vocabulary: ChatGLM3Vocabulary, ja_dir: Path, before: ChatGLM3Tokenizer, tmp_path: Path
) -> None:
    learned = base_vocabulary.read_learned(ja_dir)
    for pieces in ([], learned):
        merged = merging.merge_pieces(
            base_vocabulary, pieces, Policy.JAPANESE, max_new_pieces=0, ranking_texts=["です"]
        )
        assert merged.added == []
    merged.vocabulary.save(tmp_path)
    after = ChatGLM3Tokenizer.open(tmp_path)
    assert after.size == after.first_new_id == before.size
    result = merging.compare_segmentation(before, after, demo_texts("ja", 20), Policy.JAPANESE)
    assert result.identical == result.lines > 100


def test_a_language_without_lines_is_an_error() -> None:
    with pytest.raises(DataError, match="hold no zh text"):
        merging.check_guarantee({"zh": merging.Segmentation()}, Policy.JAPANESE)


def test_the_report_of_a_merge(
    base_vocabulary: ChatGLM3Vocabulary, before: ChatGLM3Tokenizer, ja_dir: Path
) -> None:
    learned = base_vocabulary.read_learned(ja_dir)
    merged = merging.merge_pieces(base_vocabulary, learned, Policy.HAN)
    after = tokenizer_of(merged)
    texts = {"ja": demo_texts("ja", 20, "heldout"), "zh": ["<b>線です</b>"]}
    languages = {
        language: merging.compare_segmentation(before, after, lines, Policy.HAN)
        for language, lines in texts.items()
    }
    report = merge_report.build_report(Policy.HAN, merged, languages, before, after)
    zh = report["languages"]["zh"]
    assert zh["changed"][0]["line"] == "<b>線です</b>"
    assert "".join(zh["changed"][0]["after"]) == "▁<b>線です</b>"
    assert zh["changed"][0]["new"] == [p in merged.added for p in zh["changed"][0]["after"]]
    assert any(zh["changed"][0]["new"])
    assert report["languages"]["ja"]["used_share"] == len(languages["ja"].used) / len(merged.added)
    page = merge_report.render_html(report, "ChatGLM3")
    assert f"{len(merged.added):,} new pieces" in page
    assert "&lt;" in page and "<b>線" not in page
    assert loads_nothing(page)
    # Every added piece has the id under which the merged tokenizer knows it.
    ids = range(report["first_new_id"], after.size)
    assert report["added"] == [after.pieces[index] for index in ids] == merged.added
    lines = list(merge_report.describe_languages(report))
    assert len(lines) == 2 and "tokens per character" in lines[0]


@pytest.mark.parametrize(
    ("policy", "added", "left_out"),
    [
        (
            Policy.KANA,
            1,
            ", 1 not admitted by the policy, 1 made with a character that has no piece",
        ),
        (Policy.ALL, 3, ""),  # adds unreachable pieces as well
    ],
)
def test_the_headline_counts_pieces_by_reason(
    base_proto: Any,
    base_vocabulary: ChatGLM3Vocabulary,
    policy: Policy,
    added: int,
    left_out: str,
) -> None:
    known = next(p.piece for p in base_proto.pieces if p.type == p.NORMAL and len(p.piece) > 1)
    merged = merging.merge_pieces(base_vocabulary, [known, "ょ", "Ж", "ょЖあ"], policy)
    sizes = f"{len(base_proto.pieces):,} base pieces and 9 special tokens"
    assert merge_report.describe_merge(merged) == (
        f"{added} new pieces added to {sizes}: {merged.vocabulary.size:,} ids; "
        "not added: 1 already in the base" + left_out
    )


# --- Against ChatGLM3-6B's own tokenizer and the article's Japanese model ------------------------


@pytest.fixture(scope="module")
def real() -> tuple[ChatGLM3Vocabulary, list[str]]:
    base = ChatGLM3Base.open(SHARED / "chatglm3-6b").vocabulary
    return base, base.read_learned(SHARED / "reference" / "ja_bpe.model")


@needs_real_tokenizer
def test_policy_all_adds_what_the_article_added(real: tuple[ChatGLM3Vocabulary, list[str]]) -> None:
    merged = merging.merge_pieces(*real, Policy.ALL)
    assert len(merged.added) == 13_756
    assert merged.vocabulary.size == 78_554
    assert merged.dropped["unreachable"]


@needs_real_tokenizer
def test_the_articles_sample_takes_at_most_67_tokens(
    real: tuple[ChatGLM3Vocabulary, list[str]],
) -> None:
    sample = (SHARED / "parity" / "sample_ja.txt").read_text(encoding="utf-8").rstrip("\n")
    merged = merging.merge_pieces(*real, Policy.JAPANESE)
    (before,), (after,) = real[0].encode([sample]), merged.vocabulary.encode([sample])
    assert len(before) == 125
    assert len(after) <= 67


@needs_real_tokenizer
@pytest.mark.parametrize("policy", [Policy.JAPANESE, Policy.SIMPLIFIED, Policy.KANA])
def test_chinese_and_english_stay(
    real: tuple[ChatGLM3Vocabulary, list[str]], policy: Policy
) -> None:
    merged = merging.merge_pieces(*real, policy)
    before, after = ChatGLM3Tokenizer(real[0].proto), tokenizer_of(merged)
    for language in ("zh", "en"):
        texts = demo_texts(language, 1000)
        result = merging.compare_segmentation(before, after, texts, policy)
        assert result.identical == result.lines > 1000
