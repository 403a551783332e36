"""Cleaning texts, the filters that look at one text alone, and the fates of step 4's records.

A cleaned text has Unicode's canonical form, no control or invisible formatting characters, one
kind of line break, no blanks (space, tab, ideographic space) at the ends of lines and at most one
empty line in a row. Blanks inside a line stay: code and Japanese paragraphs are indented.

The language filter knows ja, zh and en and accepts every text of another language. It counts the
letters of each script: Japanese has kana, Chinese has Han characters and few kana.

To add a filter, add a member to `Fate` and a condition here or in prepare_conversations.py. The
counts, log lines, columns of data_report.html and their explanations follow from the enum.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from chatglm_ja.settings import Choice

# Control characters other than tab and line break, soft hyphens, zero-width and direction marks,
# byte-order marks, noncharacters, U+FFFD's neighbors in the specials block. Joiners stay: emoji and
# names use them.
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


class Fate(Choice):
    """The fates of a record, in the order in which they are decided.

    Step 4's report explains them by their phrases, which say what such records are.
    """

    REJECTED = "rejected", "unreadable, of the wrong type, or with the id of an earlier record"
    # Texts.
    EMPTY = "empty", "empty after cleaning"
    SHORT = "short", "of fewer characters than --min-characters"
    LANGUAGE = "language", "not in the script of their language"
    CONTAMINATED = "contaminated", "with 13 tokens in a row of an evaluation text, too much to cut"
    # Conversations.
    NO_ANSWER = "no answer at the end", "with a last message that is not the assistant's"
    TOO_LONG = (
        "too long",
        "with a last exchange that exceeds --max-length, or with --long-conversations drop as a "
        "whole",
    )
    UNTRAINED = "no trained answer", "with no answer that the record lets be trained"
    # Both.
    DUPLICATE = "duplicate", "equal to an earlier one of any source"
    NEAR_DUPLICATE = "near_duplicate", "much like an earlier text (--near-duplicates)"
    KEPT = "kept", "left to choose from, for training and validation"


def clean(text: str, unicode_form: str) -> str:
    """Return the cleaned text; `unicode_form` is NFC, NFKC or none."""
    text = clean_characters(text, unicode_form)
    if any(blank + "\n" in text for blank in _BLANKS):
        text = "\n".join(line.rstrip(_BLANKS) for line in text.split("\n"))
    if "\n\n\n" in text:
        text = _EMPTY_LINES.sub("\n\n", text)
    return text.rstrip(_BLANKS + "\n").lstrip("\n")


def clean_characters(text: str, unicode_form: str) -> str:
    """Return the text with cleaned characters; its blanks and empty lines stay as they are."""
    if _UNWANTED.search(text):
        text = _BREAK.sub("\n", text).replace(_NO_BREAK_SPACE, " ")
        text = _UNWANTED.sub("", text)
    if unicode_form != "none" and not text.isascii():
        text = unicodedata.normalize(unicode_form, text)  # type: ignore[arg-type]
    return text


def code_points(texts: Sequence[str]) -> np.ndarray:
    """Return the characters of all texts one after another, uint32."""
    return np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")


def apply_filters(
    texts: Sequence[str], codes: np.ndarray, language: str | None, min_characters: int
) -> list[Fate]:
    """Return the filter that drops each cleaned text, or Fate.KEPT.

    `codes` are the texts' code points. With `language` None the script is not checked.
    """
    fits = [True] * len(texts)
    if language in _RULES:
        fits = _fits_language(texts, codes, language)
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
    return _fits_language(texts, code_points(texts), language)


_SCRIPTS = np.zeros(0x110000, dtype=np.uint8)  # by code point
for _script, _ranges in _RANGES.items():
    for _first, _last in _ranges:
        _SCRIPTS[_first : _last + 1] = _script

# Whether texts fit a language, from the numbers of their kana, Han, Latin and all letters.
_RULES: dict[str, Callable[..., np.ndarray]] = {
    "ja": lambda kana, han, latin, letters: (
        (kana > 0) & (kana >= KANA_SHARE * (kana + han)) & (kana + han >= MIN_OWN_SHARE * letters)
    ),
    "zh": lambda kana, han, latin, letters: (
        (han > 0) & (kana < KANA_SHARE * (kana + han)) & (kana + han >= MIN_OWN_SHARE * letters)
    ),
    "en": lambda kana, han, latin, letters: (latin > 0) & (latin >= MIN_LATIN_SHARE * letters),
}
LANGUAGES = tuple(_RULES)  # those that the language filter knows


def _fits_language(texts: Sequence[str], codes: np.ndarray, language: str) -> list[bool]:
    """Return whether each text is in the script of its language; one without letters is not."""
    counts = np.zeros((5, len(texts)), dtype=np.int64)
    lengths = np.array([len(text) for text in texts])
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        scripts = _SCRIPTS[codes]
        for script in (KANA, HAN, LATIN, FOREIGN):
            counts[script, filled] = np.add.reduceat(scripts == script, starts, dtype=np.int64)
    return _RULES[language](*counts[[KANA, HAN, LATIN]], counts.sum(axis=0)).tolist()
