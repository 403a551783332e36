"""The guarantee of a policy is measured, and a broken one is an error; step 2's report."""

import re
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.chatglm3 import tokenizer, tokenizer_files
from chatglm_ja.errors import DataError
from chatglm_ja.reports import merge_report
from chatglm_ja.vocabulary import learning, merging, segmentation
from chatglm_ja.vocabulary.policies import Policy
from tests.conftest import demo_texts


@pytest.fixture
def before(base_proto: Any) -> Any:
    return tokenizer.make_processor(tokenizer.add_special_tokens(base_proto))


def test_chinese_and_english_are_segmented_as_before(before: Any, merge: Any) -> None:
    after = tokenizer.make_processor(merge.proto)
    for language in ("zh", "en"):
        result = segmentation.compare_segmentation(
            before, after, demo_texts(language, 300), Policy.JAPANESE
        )
        assert result.lines > 1000
        # One Chinese page quotes Japanese numerals (壱弐参): the only line that may change.
        assert result.covered >= result.lines - 1
        assert result.identical >= result.covered and not result.broken
    texts = demo_texts("ja", 80, "heldout")
    japanese = segmentation.compare_segmentation(before, after, texts, Policy.JAPANESE)
    assert japanese.tokens_after < 0.8 * japanese.tokens_before
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    ids = [index for line in after.encode(lines) for index in line]
    new = [index for index in ids if index >= before.get_piece_size()]
    assert japanese.used == set(new)
    assert japanese.row()["new_token_share"] == len(new) / len(ids)
    segmentation.check_guarantee({"ja": japanese}, Policy.JAPANESE)


def test_a_broken_guarantee_is_an_error(base_proto: Any, before: Any) -> None:
    """A piece without kana, such as the article's merge adds, changes a Chinese line."""
    piece = "".join(before.encode("打开文件夹。", out_type=str)[-2:])
    assert before.piece_to_id(piece) == tokenizer.UNK_ID
    after = tokenizer.make_processor(tokenizer.add_special_tokens(base_proto, [piece]))
    texts = ["打开文件夹。\nin the other\nひらがな。"]
    result = segmentation.compare_segmentation(before, after, texts, Policy.JAPANESE)
    assert result.lines == 3 and result.covered == 2
    assert result.broken == result.changed == ["打开文件夹。"]
    with pytest.raises(DataError, match="1 zh lines that the policy japanese must not change"):
        segmentation.check_guarantee({"zh": result}, Policy.JAPANESE)
    result = segmentation.compare_segmentation(before, after, texts, Policy.ALL)
    assert result.changed and not result.broken
    segmentation.check_guarantee({"zh": result}, Policy.ALL)


def test_a_tokenizer_json_that_differs_is_an_error(before: Any, merge: Any) -> None:
    after = tokenizer.make_processor(merge.proto)
    right = tokenizer_files.make_line_encoder(merge.proto)
    result = segmentation.compare_segmentation(before, after, ["あ\nです"], Policy.JAPANESE, right)
    assert not result.rust_differs
    result = segmentation.compare_segmentation(
        before,
        after,
        ["あ\nです"],
        Policy.JAPANESE,
        lambda lines: [ids[:-1] for ids in right(lines)],
    )
    assert result.rust_differs == ["あ", "です"]
    with pytest.raises(DataError, match=r"other ids than tokenizer\.model for 2 ja lines"):
        segmentation.check_guarantee({"ja": result}, Policy.JAPANESE)


def test_a_language_without_lines_is_an_error() -> None:
    with pytest.raises(DataError, match="hold no zh text"):
        segmentation.check_guarantee({"zh": segmentation.Segmentation()}, Policy.JAPANESE)


def test_the_report_of_a_merge(base_proto: Any, before: Any, ja_dir: Path) -> None:
    merged = merging.merge_pieces(base_proto, learning.read_learned(ja_dir), Policy.HAN)
    after = tokenizer.make_processor(merged.proto)
    texts = {"ja": demo_texts("ja", 20, "heldout"), "zh": ["<b>線です</b>"]}
    languages = {
        language: segmentation.compare_segmentation(before, after, lines, Policy.HAN)
        for language, lines in texts.items()
    }
    report = merge_report.build_report(Policy.HAN, merged, languages, before, after)
    zh = report["languages"]["zh"]
    assert zh["changed"][0]["line"] == "<b>線です</b>"
    assert "".join(zh["changed"][0]["after"]) == "▁<b>線です</b>"
    assert report["languages"]["ja"]["used_share"] == len(languages["ja"].used) / len(merged.added)
    page = merge_report.render_html(report)
    assert f"{len(merged.added):,} new pieces" in page
    assert "&lt;" in page and "<b>線" not in page
    assert not re.search("<(script|link|img|iframe)|url\\((?!#)", page)  # loads nothing
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
    base_proto: Any, policy: Policy, added: int, left_out: str
) -> None:
    known = next(p.piece for p in base_proto.pieces if p.type == p.NORMAL and len(p.piece) > 1)
    learned = type(base_proto)()
    for piece in (known, "ょ", "Ж", "ょЖあ"):
        learned.pieces.add(piece=piece, score=0.0, type=learned.SentencePiece.NORMAL)
    merged = merging.merge_pieces(base_proto, learned, policy)
    sizes = f"{len(base_proto.pieces):,} base pieces and 9 special tokens"
    assert merge_report.describe_merge(merged) == (
        f"{added} new pieces added to {sizes}: {len(merged.proto.pieces):,} ids; "
        "not added: 1 already in the base" + left_out
    )
