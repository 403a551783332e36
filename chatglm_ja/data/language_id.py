"""Which language a text is in, as far as ja, zh and en can be told; every other one is accepted.

The filter of step 4 weighs the prose of a text: what is written in its language against what is
written in another one. Code, commands, names and numbers are on neither side, so a Japanese page
that is mostly code is Japanese, and an English page under a Japanese menu is not.

    ja   lines with kana                 against   lines of Latin words, Han without kana
    zh   lines of Han, without kana      against   lines of Latin words, kana
    en   common English words            against   those of other languages, diacritics, kana, Han

A line of Latin letters is prose if it has common words, or several words and no mark of code.
English and other languages of Latin script
are told by these words, too, as in Gopher's filter (arXiv 2112.11446, appendix A.1.1). Han without
kana is Chinese only in a sentence: addresses, headlines and tables of Japanese pages have no kana.

An answer of a model, or a single line, is too short to be weighed. `in_language` tells its script
alone: Japanese has kana, Chinese has Han characters and few kana.

Everything is counted for many texts at once, on their code points.
"""

from collections.abc import Callable, Sequence

import numpy as np

# Scripts of letters, and marks of a sentence and of code; everything else does not count.
OTHER, KANA, HAN, LATIN, FOREIGN, MARK, CODE = range(7)
_RANGES = {
    KANA: [(0x3041, 0x3096), (0x30A1, 0x30FA), (0x30FC, 0x30FC), (0x31F0, 0x31FF),
           (0xFF66, 0xFF9D)],
    HAN: [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)],
    LATIN: [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F),
            (0x1E00, 0x1EFF)],
    # Greek to the South Asian and Ethiopic scripts, Hangul.
    FOREIGN: [(0x370, 0x3FF), (0x400, 0x1DBF), (0x1F00, 0x1FFF), (0x3131, 0x318E),
              (0xA000, 0xABFF), (0xAC00, 0xD7AF)],
    # The full stop and the comma of Chinese.
    MARK: [(0x3002, 0x3002), (0xFF0C, 0xFF0C)],
    CODE: [(ord(mark), ord(mark)) for mark in "()[]{}<>=;_$@#|\\"],
}  # fmt: skip
# The least share of kana and Han characters among the letters of a Japanese or Chinese answer. It
# is low because answers are full of commands and names.
MIN_OWN_SHARE = 0.2
# The share of kana among kana and Han characters that separates Japanese from Chinese. Japanese
# prose is half kana; a Chinese page about Japan quotes some.
KANA_SHARE = 0.1
MIN_LATIN_SHARE = 0.5
# So many Latin letters say about as much as one Han character or kana.
LATIN_PER_HAN = 3
# Of English words, about every fourth is common: in as much text as this many Han characters are.
HAN_PER_COMMON_WORD = 7
# A line of Latin letters is prose with as many common words, or as many words without marks of
# code: headlines and labels of a page that was not translated. Other lines are code, or names.
MIN_COMMON_WORDS = MIN_LABEL_WORDS = 2

# Words of at most four letters that are frequent in English, and in other languages of Latin
# script but not in English; neither are frequent in code (for, is, in, do, em).
_ENGLISH = "the of and to that it are be this was by on you have can an at will"
_NOT_ENGLISH = (
    "der das und ist mit ein dem zu auf "  # German
    "le la les des de et du une est que dans "  # French
    "el los las una con del "  # Spanish
    "il di che nel "  # Italian
    "da ao uma "  # Portuguese
    "het een voor dat zijn "  # Dutch
    "och att det som av til "  # Swedish, Danish, Norwegian
    "na nie jest "  # Polish, Czech
    "yang dari ini "  # Indonesian, Malay
)


def code_points(texts: Sequence[str]) -> np.ndarray:
    """Return the characters of all texts one after another, uint32."""
    return np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")


def in_language(texts: Sequence[str], language: str) -> list[bool] | None:
    """Return whether each text is in the script of ja, zh or en; None for another language.

    A text without letters is in none of them.
    """
    if language not in _SCRIPT_RULES:
        return None
    scripts = SCRIPTS.take(code_points(texts))
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    counts = np.zeros((FOREIGN + 1, len(texts)), dtype=np.int64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        for script in (KANA, HAN, LATIN, FOREIGN):
            counts[script, filled] = np.add.reduceat(scripts == script, starts, dtype=np.int64)
    return _SCRIPT_RULES[language](*counts[[KANA, HAN, LATIN]], counts.sum(axis=0)).tolist()


SCRIPTS = np.zeros(0x110000, dtype=np.uint8)  # by code point
for _script, _ranges in _RANGES.items():
    for _first, _last in _ranges:
        SCRIPTS[_first : _last + 1] = _script

_PACKED = np.zeros(CODE + 1, dtype=np.int64)
_PACKED[[KANA, HAN, LATIN]] = 1, 2**21, 2**42

# Whether texts fit a language, from the numbers of their kana, Han, Latin and all letters.
_SCRIPT_RULES: dict[str, Callable[..., np.ndarray]] = {
    "ja": lambda kana, han, latin, letters: (
        (kana > 0) & (kana >= KANA_SHARE * (kana + han)) & (kana + han >= MIN_OWN_SHARE * letters)
    ),
    "zh": lambda kana, han, latin, letters: (
        (han > 0) & (kana < KANA_SHARE * (kana + han)) & (kana + han >= MIN_OWN_SHARE * letters)
    ),
    "en": lambda kana, han, latin, letters: (latin > 0) & (latin >= MIN_LATIN_SHARE * letters),
}
LANGUAGES = tuple(_SCRIPT_RULES)  # those that can be told


def fits_language(texts: Sequence[str], codes: np.ndarray, language: str) -> np.ndarray:
    """Return whether the prose of each text is in ja, zh or en, bool.

    `codes` are the texts' code points. A tie is for the language: a page of code with a line of it
    fits. A text without its script does not.
    """
    fits = np.zeros(len(texts), dtype=bool)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        starts = (np.cumsum(lengths) - lengths)[filled]
        fits[filled] = _weigh(codes, SCRIPTS.take(codes), starts, language)
    return fits


def find_lines(codes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return where the lines of the texts that begin at `starts` begin."""
    begins = np.roll(codes == ord("\n"), 1)
    begins[starts] = True
    return np.flatnonzero(begins)


def is_letter(scripts: np.ndarray) -> np.ndarray:
    """Return whether characters of these scripts are letters."""
    return (scripts >= KANA) & (scripts <= FOREIGN)


def _weigh(codes: np.ndarray, scripts: np.ndarray, starts: np.ndarray, language: str) -> np.ndarray:
    """Return whether the texts that begin at `starts` have as much prose in the language."""

    def count(script: int, begins: np.ndarray) -> np.ndarray:
        mask = scripts == script
        if not mask.any():
            return np.zeros(len(begins), dtype=np.int32)
        return np.add.reduceat(mask.astype(np.int32), begins)

    if language == "en":
        is_other = is_letter(scripts) & (scripts != LATIN)
        other_scripts = np.add.reduceat(is_other.astype(np.int32), starts)
        english, others, _ = count_words(codes, scripts, starts)
        fits = english >= others + other_scripts / HAN_PER_COMMON_WORD
        return (count(LATIN, starts) > 0) & fits
    lines = find_lines(codes, starts)
    # Three counts in one number: a line has at most a million characters (corpus.py).
    packed = np.add.reduceat(_PACKED.take(scripts), lines)
    kana, han, latin = (packed >> shift & (2**21 - 1) for shift in (0, 21, 42))
    foreign = count(FOREIGN, lines)
    is_japanese = (kana > 0) & (kana >= KANA_SHARE * (kana + han))
    is_chinese = (han > 0) & ~is_japanese
    if language == "ja":
        own, strange = is_japanese, is_chinese & (count(MARK, lines) > 0)
    else:
        own, strange = is_chinese, is_japanese
    others = strange * (kana + han) + foreign
    # Common words are searched for only in the lines in which they count.
    is_latin = (kana + han == 0) & (latin > 0)
    if is_latin.any():
        lengths = np.diff(lines, append=len(codes))
        inside = np.repeat(is_latin, lengths)
        begins = np.cumsum(lengths[is_latin]) - lengths[is_latin]
        latin_scripts = scripts[inside]
        english, not_english, words = count_words(codes[inside], latin_scripts, begins)
        marks = np.add.reduceat((latin_scripts == CODE).astype(np.int32), begins)
        is_label = (words >= MIN_LABEL_WORDS) & (marks == 0)
        is_prose = is_label | (english + not_english >= MIN_COMMON_WORDS)
        others[is_latin] += is_prose * latin[is_latin] // LATIN_PER_HAN
    first = np.searchsorted(lines, starts)
    own = np.add.reduceat(own * (kana + han), first)
    return (own > 0) & (own >= np.add.reduceat(others, first))


def count_words(
    codes: np.ndarray, scripts: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count common English words, those of other languages with letters with diacritics, all words.

    A word is a run of Latin letters. Returns three numbers for each of the texts, or lines, that
    begin at `starts`; none of them may be empty.
    """
    is_latin = scripts == LATIN
    begins, ends = is_latin.copy(), is_latin.copy()
    begins[1:] &= ~is_latin[:-1]
    ends[:-1] &= ~is_latin[1:]
    begins[starts] = is_latin[starts]
    ends[starts[1:] - 1] = is_latin[starts[1:] - 1]
    places = np.flatnonzero(begins)
    all_places, lengths = places, np.flatnonzero(ends) + 1 - places
    is_short = lengths <= WORD_LETTERS
    places, lengths = places[is_short], lengths[is_short]
    numbers = np.zeros(len(places), dtype=np.int32)
    for i in range(WORD_LETTERS):
        letters = codes.take(places + i, mode="clip")
        numbers = 32 * numbers + np.where(i < lengths, _letter_number(letters), 0)
    kinds = _WORD_KINDS[numbers]
    english, not_english, diacritics, words = (
        np.diff(np.searchsorted(found, starts), append=len(found))
        for found in (
            places[kinds == ENGLISH],
            places[kinds == NOT_ENGLISH],
            np.flatnonzero(is_latin & (codes >= 0xC0)),
            all_places,
        )
    )
    return english, not_english + diacritics, words


def _letter_number(codes: np.ndarray) -> np.ndarray:
    """Return 1 to 26 for the letters a to z and A to Z, 31 for letters outside of ASCII."""
    return (np.minimum(codes, 127) & 31).astype(np.int32)


ENGLISH, NOT_ENGLISH = 1, 2
WORD_LETTERS = 4
_WORD_KINDS = np.zeros(32**WORD_LETTERS, dtype=np.uint8)  # by the numbers of the letters
for _kind, _words in ((ENGLISH, _ENGLISH), (NOT_ENGLISH, _NOT_ENGLISH)):
    for _word in _words.split():
        _codes = np.frombuffer(_word.ljust(WORD_LETTERS, "\0").encode(), dtype=np.uint8)
        _WORD_KINDS[np.polyval(_letter_number(_codes), 32)] = _kind
