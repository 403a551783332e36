"""Policies on bytes, against a computation over all of Unicode by its definition."""

import sys
import unicodedata

import pytest

from chatglm_ja.vocabulary.policies import Policy

CHARACTERS = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]


@pytest.mark.parametrize("policy", Policy)
def test_leading_bytes_count_if_all_letters_that_begin_so_are_admitted(policy: Policy) -> None:
    admitted = {character for character in CHARACTERS if policy.admits(character)}
    letters: dict[bytes, list[bool]] = {}  # of all letters that begin with these bytes
    for character in CHARACTERS:
        encoded = character.encode()
        for length in range(1, len(encoded)):
            is_admitted = letters.setdefault(encoded[:length], [])
            if unicodedata.category(character)[0] in "LM":
                is_admitted.append(character in admitted)
    leading = {start for start, which in letters.items() if which and all(which)}

    def starts(encoded: bytes) -> bool:
        """Whether a character's bytes, or its first ones, hold leading bytes of the policy."""
        return any(encoded[:length] in leading for length in range(1, len(encoded) + 1))

    for character in CHARACTERS:
        encoded = character.encode()
        assert policy.admits(encoded) == (character in admitted or starts(encoded[:-1]))
    for start in letters:
        assert policy.admits(start) == (starts(start) or policy is Policy.ALL)
        assert policy.admits(b"a \x80" + start) == policy.admits(start)


@pytest.mark.parametrize(
    ("piece", "admitted_by"),
    [
        ("あ".encode()[:2], "japanese simplified kana han letters"),
        ("日本です".encode()[1:-1], "japanese simplified kana han letters"),
        ("・".encode(), "japanese simplified kana han letters"),  # begins as katakana does
        ("込".encode(), "japanese simplified han"),
        ("込".encode()[:2], "han"),
        ("込".encode()[1:], ""),
        ("国".encode()[:1], "han"),
        ("한".encode()[:1], "letters"),
        ("ー".encode()[:1], ""),  # E3 begins kana, Bopomofo and Han
        ("한".encode()[:2], "letters"),
        ("ж".encode()[:1], "letters"),
        (b"the", ""),
        ("é".encode()[:1], "letters"),
    ],
)
def test_pieces_of_bytes(piece: bytes, admitted_by: str) -> None:
    assert {policy for policy in Policy if policy.admits(piece)} == {*admitted_by.split(), "all"}


@pytest.mark.parametrize("policy", Policy)
def test_a_line_holds_no_piece_that_it_does_not_admit(policy: Policy) -> None:
    """The guarantee: whatever bytes of a line a piece has, the line is admitted if the piece is."""
    for line in ("日本・中国ー한국 é込み", "ﾃｽﾄＡ゠ж🦊𠀋ᄀ", "中国。abc"):
        encoded = line.encode()
        for start in range(len(encoded)):
            for end in range(start + 1, len(encoded) + 1):
                assert policy.admits(encoded) or not policy.admits(encoded[start:end])


def test_the_guarantee_says_what_bytes_leave_out() -> None:
    assert Policy.KANA.describe_guarantee(in_bytes=False) == Policy.KANA.guarantee
    assert "as ・ begins like katakana" in Policy.KANA.describe_guarantee(in_bytes=True)
    assert not Policy.KANA.admits("・")
