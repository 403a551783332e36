"""Cleaning keeps the visible text."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_ja.data import cleaning


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
