"""Cleaning texts, and the filters that look at one text alone: empty, short, language.

A cleaned text has Unicode's canonical form, no control or invisible formatting characters, one
kind of line break, no blanks (space, tab, ideographic space) at the ends of lines and at most one
empty line in a row. Blanks inside a line stay: code and Japanese paragraphs are indented.

The language filter knows ja, zh and en and accepts every text of another language. It counts the
letters of each script: Japanese has kana, Chinese has Han characters and few kana.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from chatglm_ja.data.fates import Fate

# Controls but tab and line break, soft hyphens, zero-width and direction marks, byte-order marks,
# noncharacters, U+FFFD's neighbors in the specials block. Joiners stay: emoji and names use them.
_REMOVED = (
    "\x01-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufeff\ufff0-\ufffb\ufffe\uffff\ufdd0-\ufdef"
)
_BREAKS = "\r\x0b\x0c\x85\u2028\u2029"
_NO_BREAK_SPACE = "\xa0"
_UNWANTED = re.compile(f"[{_REMOVED}{_BREAKS}{_NO_BREAK_SPACE}]")
_BREAK = re.compile(f"\r\n|[{_BREAKS}]")
_EMPTY_LINES = re.compile("\n{3,}")
_BLANKS = " \t\u3000"

# Scripts of letters; everything else (digits, punctuation, symbols) does not count.
OTHER, KANA, HAN, LATIN, FOREIGN = range(5)
_RANGES = {
    KANA: [(0x3041, 0x3096), (0x30A1, 0x30FA), (0x30FC, 0x30FC), (0x31F0, 0x31FF),
           (0xFF66, 0xFF9D)],
    HAN: [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)],
    LATIN: [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F),
            (0x1E00, 0x1EFF)],
    # Greek to the South Asian and Ethiopic scripts, Hangul.
    FOREIGN: [(0x370, 0x3FF), (0x400, 0x1DBF), (0x1F00, 0x1FFF), (0x3131, 0x318E),
              (0xA000, 0xABFF), (0xAC00, 0xD7AF)],
}  # fmt: skip
# The least share of kana and Han characters among the letters of a Japanese or Chinese text. It is
# low because a manual is full of commands and names.
MIN_OWN_SHARE = 0.2
# The share of kana among kana and Han characters that separates Japanese from Chinese. Japanese
# prose is half kana; a Chinese page about Japan quotes some.
KANA_SHARE = 0.1
MIN_LATIN_SHARE = 0.5


def clean(text: str, unicode_form: str) -> str:
    """Return the cleaned text; `unicode_form` is NFC, NFKC or none."""
    if _UNWANTED.search(text):
        text = _BREAK.sub("\n", text).replace(_NO_BREAK_SPACE, " ")
        text = _UNWANTED.sub("", text)
    if unicode_form != "none" and not text.isascii():
        text = unicodedata.normalize(unicode_form, text)  # type: ignore[arg-type]
    if any(blank + "\n" in text for blank in _BLANKS):
        text = "\n".join(line.rstrip(_BLANKS) for line in text.split("\n"))
    if "\n\n\n" in text:
        text = _EMPTY_LINES.sub("\n\n", text)
    return text.rstrip(_BLANKS + "\n").lstrip("\n")


def code_points(texts: Sequence[str]) -> np.ndarray:
    """Return the characters of all texts one after another, uint32."""
    return np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")


def apply_filters(
    texts: Sequence[str], codes: np.ndarray, language: str | None, min_characters: int
) -> list[Fate]:
    """Return the filter that drops each cleaned text, or Fate.KEPT.

    `codes` are the texts' code points. With `language` None the script is not checked.
    """
    fits = _fits_language(texts, codes, language) if language in _RULES else [True] * len(texts)
    fates = []
    for text, is_in_language in zip(texts, fits, strict=True):
        if not text:
            fates.append(Fate.EMPTY)
        elif len(text) < min_characters:
            fates.append(Fate.SHORT)
        else:
            fates.append(Fate.KEPT if is_in_language else Fate.LANGUAGE)
    return fates


def in_language(texts: Sequence[str], language: str) -> list[bool] | None:
    """Return whether each text is in the script of ja, zh or en; None for another language."""
    if language not in _RULES:
        return None
    return [bool(fits) for fits in _fits_language(texts, code_points(texts), language)]


_SCRIPTS = np.zeros(0x110000, dtype=np.uint8)  # by code point
for _script, _ranges in _RANGES.items():
    for _first, _last in _ranges:
        _SCRIPTS[_first : _last + 1] = _script


def _fits_language(texts: Sequence[str], codes: np.ndarray, language: str | None) -> list[bool]:
    """Return whether each text is in the script of its language; one without letters is not."""
    counts = np.zeros((5, len(texts)), dtype=np.int64)
    lengths = np.array([len(text) for text in texts])
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        scripts = _SCRIPTS[codes]
        for script in (KANA, HAN, LATIN, FOREIGN):
            counts[script, filled] = np.add.reduceat(scripts == script, starts, dtype=np.int64)
    return list(_RULES[language or ""](counts))


def _is_japanese(counts: np.ndarray) -> np.ndarray:
    own, letters = counts[KANA] + counts[HAN], counts.sum(axis=0)
    return (
        (counts[KANA] > 0) & (counts[KANA] >= KANA_SHARE * own) & (own >= MIN_OWN_SHARE * letters)
    )


def _is_chinese(counts: np.ndarray) -> np.ndarray:
    own, letters = counts[KANA] + counts[HAN], counts.sum(axis=0)
    return (counts[HAN] > 0) & (counts[KANA] < KANA_SHARE * own) & (own >= MIN_OWN_SHARE * letters)


def _is_english(counts: np.ndarray) -> np.ndarray:
    letters = counts.sum(axis=0)
    return (counts[LATIN] > 0) & (counts[LATIN] >= MIN_LATIN_SHARE * letters)


_RULES = {"ja": _is_japanese, "zh": _is_chinese, "en": _is_english}
LANGUAGES = tuple(_RULES)  # those that the language filter knows
