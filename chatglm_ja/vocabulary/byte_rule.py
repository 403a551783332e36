"""A policy's characters, as pieces of bytes hold them: whole, or by their leading bytes.

A piece of bytes may hold a part of a character only. Its leading bytes tell as much as the
character does if all letters that begin with them are the policy's:

    E3 81 82    あ, whole                                        admitted as the character is
    E3 81       ぁ to み, hiragana                                admitted: all are kana
    E3 83       ダ to ヿ, katakana, and ・, which is no letter     admitted: all letters are kana
    E8 BE       込, but also 辻 and 農                             not admitted
    82          the end of a character                           not admitted

Lines are read by the same rule, because a piece may end with the first two bytes of their ・.
"""

import re
import sys
import unicodedata

import numpy as np

from chatglm_ja.vocabulary.policies import character_class


class ByteRule:
    """A class of characters, extended to pieces of UTF-8 that may begin or end inside a character.

    Leading bytes belong to it if some letter or mark begins with them and all that do are
    characters of the class.
    """

    def __init__(self, pattern: re.Pattern[str]) -> None:
        """Take a regex of one character. A regex of the empty text holds every piece."""
        characters = [chr(code) for code in range(sys.maxunicode + 1)]
        is_member = np.array([pattern.search(c) is not None for c in characters])
        is_letter = np.array([unicodedata.category(c)[0] in "LM" for c in characters])
        self._prefixes: set[bytes] = set()
        for size, low, high in ((2, 0x80, 0x800), (3, 0x800, 0x10000), (4, 0x10000, 0x110000)):
            codes = np.arange(low, high)
            letters, admitted = is_letter[low:high], is_letter[low:high] & is_member[low:high]
            belongs = np.zeros(len(codes), dtype=bool)  # by some of its leading bytes
            for length in range(1, size):
                bits = 6 * (size - length)
                number = np.bincount(codes >> bits, letters)
                every = (number > 0) & (number == np.bincount(codes >> bits, admitted))
                belongs |= every[codes >> bits]
                for group in np.unique(codes[belongs] >> bits).tolist():
                    character = chr(max(group << bits, low))
                    self._prefixes.add(character.encode("utf-8", "surrogatepass")[:length])
            is_member[low:high] |= belongs
        holds_all = pattern.search("") is not None
        self._pattern = pattern if holds_all else re.compile(character_class(is_member.tolist()))

    def holds(self, piece: bytes) -> bool:
        """Return whether UTF-8, of a text or a piece, has a character or leading bytes of it."""
        if self._pattern.search(piece.decode("utf-8", errors="ignore")):
            return True
        return any(piece[-length:] in self._prefixes for length in (1, 2, 3))
