"""Cleaning keeps the visible text; each filter drops what it is named for."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_ja.data import cleaning
from chatglm_ja.data.cleaning import Fate


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("か\u3099き", "がき"),  # combining marks are composed
        ("ＡＢＣ①ｶﾞ", "ＡＢＣ①ｶﾞ"),  # full-width forms stay: no NFKC
        ("a\r\nb\rc\u2028d\x0be", "a\nb\nc\nd\ne"),
        ("a\x07b\u200bc\ufeffd\u202ee\xadf", "abcdef"),
        ("a\xa0b", "a b"),
        ("家族👨\u200d👩\u200d👧", "家族👨\u200d👩\u200d👧"),
        ("a  \nb\u3000\nc\t\n", "a\nb\nc"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("\n\n\u3000段落\n    code  x\n\n", "\u3000段落\n    code  x"),
        (" \n ", ""),
        ("か\u200b\u3099", "が"),  # composed once the character between is removed
        ("a\u2003\nb \nc", "a\u2003\nb\nc"),  # a line is cleaned whatever the others hold
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert cleaning.clean(text, "NFC") == cleaned


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = cleaning.clean(text, "NFC")
    assert cleaning.clean(once, "NFC") == once
    # Visible characters are only composed.
    visible = [
        c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c)[0] in "LNPS"
    ]
    assert [c for c in once if unicodedata.category(c)[0] in "LNPS"] == visible


def test_the_unicode_form_is_a_choice() -> None:
    assert cleaning.clean("Ａ①か\u3099", "NFKC") == "A1が"
    assert cleaning.clean("Ａ①か\u3099", "none") == "Ａ①か\u3099"


JAPANESE = "日本語の文章は、ひらがなとカタカナと漢字で書かれています。"
CHINESE = "中文文章只用汉字书写，偶尔引用日语的单词，例如「の」。"
ENGLISH = "English text is written in Latin letters, naïve or not."
RUSSIAN = "Русский текст написан кириллицей, а не латиницей."


@pytest.mark.parametrize(
    ("language", "kept"),
    [("ja", [JAPANESE]), ("zh", [CHINESE]), ("en", [ENGLISH]),
     ("ru", [JAPANESE, CHINESE, ENGLISH, RUSSIAN])],
)  # fmt: skip
def test_the_language_filter_checks_the_script(language: str, kept: list[str]) -> None:
    texts = [JAPANESE, CHINESE, ENGLISH, RUSSIAN]
    fates = cleaning.apply_filters(texts, cleaning.code_points(texts), language, 1)
    assert fates == [Fate.KEPT if text in kept else Fate.LANGUAGE for text in texts]


def test_the_first_filter_that_matches_decides() -> None:
    texts = [
        "",
        "短い",
        "12345678901234567890",
        JAPANESE,
        "Python の print 関数は標準出力に書きます",
    ]
    codes = cleaning.code_points(texts)
    assert cleaning.apply_filters(texts, codes, "ja", 10) == [
        Fate.EMPTY, Fate.SHORT, Fate.LANGUAGE, Fate.KEPT, Fate.KEPT,
    ]  # fmt: skip
    assert cleaning.apply_filters(texts, codes, None, 1) == [Fate.EMPTY, *[Fate.KEPT] * 4]
    assert cleaning.apply_filters([], cleaning.code_points([]), "ja", 10) == []


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("グラフの種類を選択します。", {"ja"}),
        ("選択「書式」", {"zh"}),  # nothing says that this is Japanese
        ("选择「格式」选项卡。", {"zh"}),
        ("Choose Format - Page.", {"en"}),
        ("100000", set()),
        ("", set()),
    ],
)
def test_the_language_of_an_answer_is_its_script_s(text: str, languages: set[str]) -> None:
    matches = {name for name in ("ja", "zh", "en") if cleaning.in_language([text], name) == [True]}
    assert matches == languages
    assert cleaning.in_language([text], "code") is None
