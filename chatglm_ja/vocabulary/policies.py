"""Policies: which pieces may be added to the base's vocabulary, and what each guarantees.

A policy is a class of characters. It admits a piece that has one of them. A line that has none of
them holds no new piece, so its ids do not change: that is the policy's guarantee, which step 2
checks on held-out lines.
"""

import functools
import itertools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from chatglm_ja.errors import DataError
from chatglm_ja.settings import Choice

if TYPE_CHECKING:  # numpy takes a moment to import, and --help needs this module
    from chatglm_ja.vocabulary.byte_rule import ByteRule

# A policy that admits less than this share of texts, or of pieces, is for another language.
LEAST_SHARE = 0.1
PROBED_LINES = 10_000
OTHER_LANGUAGE = "for a language other than Japanese, pass --policy letters"
# What the guarantee of any policy leaves out if pieces are bytes.
BYTES_GUARANTEE = (
    "Pieces of this vocabulary are bytes, so a line may also change if it has a sign that begins "
    "with the same bytes as only the policy's letters do, as ・ begins like katakana."
)

# Hiragana and katakana letters and the long-vowel mark, of any width.
_KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
_HAN = "\u3400-\u9fff\uf900-\ufaff\u3005"


def japanese_kanji(*chinese: str) -> str:
    """Return the kanji of JIS X 0208 that none of the codecs for Chinese covers.

    Those that neither gb2312 nor big5 covers are 込, 働, 気, 図 ...; 開, 動, 電 ... are in big5.
    Python's shift_jis codec covers JIS X 0208 and no kanji beyond it (euc_jp adds JIS X 0212).
    """
    han = "".join(filter(re.compile(f"[{_HAN}]").match, map(chr, range(0x10000))))
    japanese, *others = (
        set(han.encode(codec, errors="ignore").decode(codec)) for codec in ("shift_jis", *chinese)
    )
    return "".join(sorted(japanese.difference(*others)))


def other_letters() -> str:
    """Return the regex of letters of neither English nor Chinese, and vowel signs of others.

    Such as 한, й, ß, ไ and its ี. Excluded are the marks that any script may use: combining
    accents, tone marks, variation selectors.
    """
    excluded = re.compile(
        f"[A-Za-z\uff21-\uff3a\uff41-\uff5a{_HAN}\U00020000-\U0003ffff"
        "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u302a-\u302f\ufe00-\ufe0f"
        "\ufe20-\ufe2f\U000e0100-\U000e01ef]"
    )
    characters = map(chr, range(sys.maxunicode + 1))
    letters = (unicodedata.category(c)[0] in "LM" and not excluded.match(c) for c in characters)
    return character_class(letters)


def character_class(is_member: Iterable[bool]) -> str:
    """Write the regex of the code points that are set, as ranges: `re` searches those quickly."""
    spans, code = [], 0
    for is_inside, run in itertools.groupby(is_member):
        end = code + sum(1 for _ in run)
        if is_inside:
            spans.append(f"\\U{code:08x}-\\U{end - 1:08x}")
        code = end
    return f"[{''.join(spans)}]"


class Policy(Choice):
    """A policy: its name, its phrase for --help, its guarantee, and a regex of its characters.

    The regex comes from a function, because some character classes take a moment to compute.
    `language` is the only one that has such pieces, if there is only one. `keeps_unreachable` adds
    pieces even if no text produces them.
    """

    JAPANESE = (
        "japanese",
        "pieces with kana or a kanji that Chinese does not use; Chinese and English are unchanged",
        "A line without kana whose Han characters are all in GB 2312 or Big5, the standards of "
        "simplified and traditional Chinese, keeps its ids, and so does every line without Han "
        "characters. (Precisely: a line without kana and without a kanji that is in JIS X 0208 and "
        "in neither of the two.)",
        lambda: f"[{_KANA}{japanese_kanji('gb2312', 'big5')}]",
        "ja",
    )
    SIMPLIFIED = (
        "simplified",
        "pieces with kana or a kanji that simplified Chinese does not use; simplified Chinese and "
        "English are unchanged",
        "A line without kana whose Han characters are all in GB 2312, the standard of simplified "
        "Chinese, keeps its ids, and so does every line without Han characters. Traditional "
        "Chinese may change.",
        lambda: f"[{_KANA}{japanese_kanji('gb2312')}]",
        "ja",
    )
    KANA = (
        "kana",
        "pieces with kana; Chinese and English are unchanged",
        "A line without kana keeps its ids.",
        lambda: f"[{_KANA}]",
        "ja",
    )
    HAN = (
        "han",
        "pieces with kana or any Han character; English is unchanged",
        "A line without kana and Han characters keeps its ids: English; Chinese may change.",
        lambda: f"[{_KANA}{_HAN}]",
    )
    LETTERS = (
        "letters",
        "for other languages, pieces with a letter or vowel sign that is neither Han nor one of a "
        "to z; Chinese and English are unchanged",
        "A line whose letters are all A to Z, a to z or Han characters keeps its ids: English and "
        "Chinese. (Vowel signs of other scripts count as letters.)",
        other_letters,
    )
    ALL = (
        "all",
        "every piece, unreachable ones too",
        "None: Chinese and English lines may change, and pieces that no text produces are kept.",
        lambda: "",
        None,
        True,
    )

    def __init__(
        self,
        _name: str,
        _phrase: str,
        guarantee: str,
        regex: Callable[[], str],
        language: str | None = None,
        keeps_unreachable: bool = False,
    ) -> None:
        self.guarantee = guarantee
        self.language = language
        self.keeps_unreachable = keeps_unreachable
        self._pattern = functools.cache(lambda: re.compile(regex()))

    def admits(self, piece: str | bytes) -> bool:
        """Return whether a piece may be added, or a line may change: it has one of the characters.

        Bytes count by the rule of byte_rule.py. The empty regex of `all` matches everything.
        """
        if isinstance(piece, bytes):
            return self._byte_rule.holds(piece)
        return self._pattern().search(piece) is not None

    @functools.cached_property
    def _byte_rule(self) -> "ByteRule":
        from chatglm_ja.vocabulary.byte_rule import ByteRule

        return ByteRule(self._pattern())

    def describe_guarantee(self, *, in_bytes: bool) -> str:
        """Return the guarantee, for a vocabulary of characters or of bytes."""
        return f"{self.guarantee} {BYTES_GUARANTEE}" if in_bytes else self.guarantee

    def probe(self, lines: Iterable[str]) -> Iterator[str]:
        """Yield lines of text; raise DataError before the first if hardly any can give a piece.

        The first PROBED_LINES are read, and count by their characters.
        """
        lines = iter(lines)
        first = list(itertools.islice(lines, PROBED_LINES))
        admitted = sum(len(line) for line in first if self.admits(line))
        share = admitted / max(sum(map(len, first)), 1)
        if first and share < LEAST_SHARE:
            raise DataError(
                f"the policy {self} admits {self.phrase.partition(';')[0]}, which hardly any of "
                f"this text can give ({share:.1%}): {OTHER_LANGUAGE}"
            )
        yield from first
        yield from lines
