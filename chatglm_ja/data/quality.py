"""The quality of pages from the web: those that hold no prose are junk.

Sources with `quality: web` are judged. A page is dropped by the first rule that it breaks:

    mojibake       characters of text that was decoded in a wrong encoding
    symbols        few letters: numbers, prices, drawings
    repeated       runs of 16 letters and digits that stood before in the text: lines, phrases
    boilerplate    lines with a copyright or the like
    truncated      lines that end in an ellipsis: results of a search
    no_sentences   hardly any line with a sentence: menus, keywords, logs, addresses, indexes
    unnatural      few of the characters or words that all prose has: names, random characters

All are shares of the page. The last two need a page with enough text to judge. Code counts as
text in English only: a Japanese or Chinese page of code may have no sentence.

The rules follow Gopher (arXiv 2112.11446, appendix A.1.1), C4 (arXiv 1910.10683), FineWeb (arXiv
2406.17557) and, for Japanese, Swallow (arXiv 2404.17733). Limits without a source were chosen so
that every kind of junk in benchmarks/data_filters.py is dropped and at most 1% of good pages are:
published limits, made for crawls that can spare a third of their pages, drop more of manuals.
docs/data.md has the figures.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from chatglm_ja.data import language_id
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.language_id import HAN, KANA, LATIN, LATIN_PER_HAN

MAX_MOJIBAKE = 0.01
MIN_LETTERS = 0.4
# Gopher and Swallow: duplicate n-grams of 10 words, or characters, 0.1; duplicate lines 0.3.
MAX_REPEATED = 0.7
REPEATED_CHARACTERS = 16
MAX_BOILERPLATE = 0.5
MAX_TRUNCATED = 0.3  # Gopher's; Swallow: 0.2 of the sentences
MIN_SENTENCES = 0.02  # of the characters; FineWeb: 0.12 of the lines
MIN_HIRAGANA = 0.1  # of kana and Han characters; Swallow: 0.2
MIN_COMMON_HAN = 0.02  # of the Han characters of a Chinese page
MIN_COMMON_WORDS = 2  # of an English page, Gopher's; in random letters, some stand by chance
LETTERS_PER_COMMON_WORD = 500  # at most
# Sizes in Han characters or kana; LATIN_PER_HAN Latin letters count as one. A shorter line is a
# label, whatever it ends with. A shorter page cannot lack sentences.
SENTENCE_SIZE = 8
JUDGED_SIZE = 150

# C4 drops such lines; a page of little else is dropped here.
_BOILERPLATE = (
    "©", "opyright", "OPYRIGHT", "ights reserved", "ights Reserved", "RIGHTS RESERVED",
    "rivacy policy", "rivacy Policy", "erms of use", "erms of Use", "erms of service",
    "無断転載", "無断複製", "プライバシーポリシー", "利用規約",
    "版权所有", "保留所有权利", "隐私政策",
)  # fmt: skip
_COMMON_HAN = "的一是在不了有和人这中大为上个国我以要他时来用们到作可使如果您将与或会"

# What a character can be, other than a letter.
BLANK, STOP, POINT, CLOSING, HIGH, HIGH_LETTER, BROKEN = range(1, 8)
_CHARACTERS = {
    BLANK: " \n\t\u3000",
    STOP: "。！？｡",  # ends a sentence
    POINT: ".!?．",  # ends one before a blank or a closing mark
    CLOSING: "'\")]’”」』）】",
    # UTF-8, Shift JIS and GB 18030 that were read as Latin-1 or CP1252 are runs of these, with
    # letters. Cleaning has removed the control characters.
    HIGH: "".join(map(chr, range(0xA1, 0xC0))) + "‚ƒ„†‡ˆ‰Š‹ŒŽ‘“•˜™š›œžŸ€",
    HIGH_LETTER: "".join(map(chr, range(0xC0, 0x100))),
    # What invalid bytes became; kana and punctuation in UTF-8 that were read as CP932 or GBK.
    BROKEN: "\ufffd縺繧繝銇銈銉锛銆鈥",
}
# The first bytes of most characters in UTF-8, read as Latin-1.
_FIRST_BYTES = "ÂÃâã"


def judge(texts: Sequence[str], codes: np.ndarray, language: str | None) -> list[Fate]:
    """Return the rule that each cleaned text breaks, or Fate.KEPT; empty ones are kept.

    `codes` are the texts' code points. Other languages than ja, zh and en have no rule `unnatural`.
    """
    fates = [Fate.KEPT] * len(texts)
    filled = [place for place, text in enumerate(texts) if text]
    if filled:
        page = _Pages([texts[place] for place in filled], codes)
        for fate, is_broken in reversed(_find_broken_rules(page, language).items()):
            for number in np.flatnonzero(is_broken):
                fates[filled[number]] = fate
    return fates


class _Pages:
    """Texts that are measured together, none of them empty.

    starts     where each text begins in `codes`
    lines      where each line begins; a text begins one
    visible    characters of each text, without blanks
    """

    def __init__(self, texts: Sequence[str], codes: np.ndarray) -> None:
        self.texts, self.codes = texts, codes
        self.scripts, self.kinds = language_id.SCRIPTS.take(codes), _KINDS.take(codes)
        self.lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.lines = language_id.find_lines(codes, self.starts)
        self._first_lines = np.searchsorted(self.lines, self.starts)
        self.visible = np.maximum(self.count(self.kinds != BLANK), 1)
        self.line_count = np.diff(self._first_lines, append=len(self.lines))

    def count(self, mask: np.ndarray) -> np.ndarray:
        """Count the characters of each text that a mask holds."""
        return np.add.reduceat(mask.astype(np.int32), self.starts)

    def count_in_lines(self, mask: np.ndarray) -> np.ndarray:
        """Count the same in each line."""
        return np.add.reduceat(mask.astype(np.int32), self.lines)

    def add_lines(self, values: np.ndarray) -> np.ndarray:
        """Add up the lines' values in each text."""
        return np.add.reduceat(values.astype(np.int32), self._first_lines)

    def following(self, values: np.ndarray, end: int) -> np.ndarray:
        """Return the value of the next character, or `end` at the end of a text."""
        shifted = np.append(values[1:], values.dtype.type(end))
        shifted[self.starts[1:] - 1] = end
        return shifted


def _find_broken_rules(page: _Pages, language: str | None) -> dict[Fate, np.ndarray]:
    """Return which pages break each rule, in the order of the rules."""
    scripts, kinds = page.scripts, page.kinds
    is_letter, is_latin = language_id.is_letter(scripts), scripts == LATIN
    kana, han = page.count(scripts == KANA), page.count(scripts == HAN)
    other = page.count_in_lines(is_letter & ~is_latin)
    line_size = other + page.count_in_lines(is_latin) // LATIN_PER_HAN
    size = {"ja": kana + han, "zh": han}.get(language or "", page.add_lines(line_size))

    # Sentences, and lines that end in an ellipsis.
    next_kinds = page.following(kinds, BLANK)
    is_end = (kinds == STOP) | (
        (kinds == POINT) & ((next_kinds == BLANK) | (next_kinds == CLOSING))
    )
    is_long = line_size >= SENTENCE_SIZE
    is_sentence = is_long & (page.count_in_lines(is_end) > 0)
    sentences = page.add_lines(is_sentence * page.count_in_lines(kinds != BLANK))
    truncated = page.add_lines(is_long & _end_in_ellipsis(page))

    unnatural = np.zeros(len(page.texts), dtype=bool)
    if language == "ja":
        is_hiragana = (page.codes >= 0x3041) & (page.codes <= 0x3096)
        unnatural = page.count(is_hiragana) < MIN_HIRAGANA * (kana + han)
    elif language == "zh":
        unnatural = page.count(_IS_COMMON_HAN.take(page.codes)) < MIN_COMMON_HAN * han
    elif language == "en":
        words, *_ = language_id.count_words(page.codes, scripts, page.starts)
        letters = page.count(is_letter)
        unnatural = words < np.maximum(MIN_COMMON_WORDS, letters / LETTERS_PER_COMMON_WORD)

    mojibake = _count_mojibake(page, is_strict=language in language_id.LANGUAGES)
    boilerplate = np.array([_count_boilerplate(text) for text in page.texts])
    is_judged = size >= JUDGED_SIZE
    return {
        Fate.MOJIBAKE: mojibake > MAX_MOJIBAKE * page.visible,
        Fate.SYMBOLS: page.count(is_letter) < MIN_LETTERS * page.visible,
        Fate.REPEATED: _repeated_share(page, is_letter) > MAX_REPEATED,
        Fate.BOILERPLATE: boilerplate > MAX_BOILERPLATE * page.line_count,
        Fate.TRUNCATED: truncated > MAX_TRUNCATED * page.line_count,
        Fate.NO_SENTENCES: is_judged & (sentences < MIN_SENTENCES * page.visible),
        Fate.UNNATURAL: is_judged & unnatural,
    }


def _end_in_ellipsis(page: _Pages) -> np.ndarray:
    """Return whether each line ends in …, ... or ・・・."""
    last = np.append(page.lines[1:], len(page.codes)) - 1
    last -= page.codes[last] == ord("\n")
    ends = [page.codes[np.maximum(last - i, 0)] for i in range(3)]
    is_ellipsis = ends[0] == ord("…")
    for mark in ".・":
        is_ellipsis |= np.all([end == ord(mark) for end in ends], axis=0)
    return is_ellipsis


def _count_mojibake(page: _Pages, is_strict: bool) -> np.ndarray:
    """Count characters that are wrongly decoded.

    A letter of the upper half of Latin-1 beside another character of it is. Strictly, so are two
    letters, and some alone: Portuguese and French have them, but not ja, zh and en.
    """
    is_high = (page.kinds == HIGH) | (page.kinds == HIGH_LETTER)
    next_kinds = page.following(page.kinds, BLANK)
    is_next_high = (next_kinds == HIGH) | (next_kinds == HIGH_LETTER)
    is_mixed = page.kinds != next_kinds
    if is_strict:
        is_mixed |= page.kinds == HIGH_LETTER
    count = page.count(page.kinds == BROKEN) + 2 * page.count(is_high & is_next_high & is_mixed)
    if is_strict:
        count += page.count(np.isin(page.codes, [ord(c) for c in _FIRST_BYTES]))
    return count


def _count_boilerplate(text: str) -> int:
    """Count the lines with a phrase of boilerplate."""
    phrases = [phrase for phrase in _BOILERPLATE if phrase in text]
    if not phrases:
        return 0
    return sum(any(phrase in line for phrase in phrases) for line in text.split("\n"))


def _repeated_share(page: _Pages, is_letter: np.ndarray) -> np.ndarray:
    """Return the share of each text's runs of letters and digits that stood in it before.

    Runs are compared by 44 bits of a hash, so one in a million is mistaken for another one of its
    text at a length of 10 million.
    """
    is_kept = is_letter | ((page.codes >= ord("0")) & (page.codes <= ord("9")))
    owner = np.repeat(np.arange(len(page.texts), dtype=np.uint64), page.lengths)[is_kept]
    hashes = page.codes[is_kept].astype(np.uint64)
    width = 1
    while width < REPEATED_CHARACTERS and len(hashes) > width:
        # Each step mixes the hashes of two runs into that of a run twice as long; they wrap around.
        first, second = hashes[:-width], hashes[width:]
        hashes = (first * _FACTORS[0] ^ first >> np.uint64(29)) + second * _FACTORS[1]
        width *= 2
    share = np.zeros(len(page.texts))
    if width < REPEATED_CHARACTERS:
        return share
    owners = owner[: len(hashes)]
    is_inside = owners == owner[REPEATED_CHARACTERS - 1 :]
    owners = owners[is_inside]
    # The numbers of the texts in front keep the runs of each one together when they are sorted.
    runs = np.sort(owners << np.uint64(44) | hashes[is_inside] >> np.uint64(20))
    is_repeated = np.append(False, runs[1:] == runs[:-1])
    numbers = owners.astype(np.int64)  # in order, as the sorted runs are
    total = np.bincount(numbers, minlength=len(share))
    repeated = np.bincount(numbers[is_repeated], minlength=len(share))
    return repeated / np.maximum(total, 1)


# Odd numbers with irregular bits.
_FACTORS = np.array([0xD6E8FEB86659FD93, 0x9E3779B97F4A7C15], dtype=np.uint64)


def _table(dtype: type, entries: Iterable[tuple[str, int]]) -> np.ndarray:
    """Return a table by code point with a value for the characters of each entry, else zero."""
    table: np.ndarray = np.zeros(0x110000, dtype=dtype)
    for characters, value in entries:
        table[[ord(character) for character in characters]] = value
    return table


_KINDS = _table(np.uint8, ((characters, kind) for kind, characters in _CHARACTERS.items()))
_IS_COMMON_HAN = _table(np.bool_, [(_COMMON_HAN, 1)])
