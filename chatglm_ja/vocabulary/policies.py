"""Policies: which pieces may be added to the base's vocabulary."""

import functools
import re
import sys
import unicodedata
from collections.abc import Callable

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
