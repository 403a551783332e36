"""How much a text repeats itself, in units that do not depend on a tokenizer.

The units are words, and single characters of scripts without spaces (kana, Han) and punctuation:

    "the cat, the cat"    the | cat | , | the | cat
    "猫が好き。"           猫 | が | 好 | き | 。
"""

import re
from collections.abc import Sequence

import numpy as np

N = 4
MIN_TURNS = 3

_SINGLE = r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNITS = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s]")


def split_units(text: str) -> list[str]:
    """The words, single characters and marks of a text, without the space between them."""
    return _UNITS.findall(text)


def repeated_share(parts: Sequence[str], n: int = N) -> float:
    """The share of n-grams that stood before in the same text: 1 - distinct / all.

    seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319), over units instead of tokens. A text
    shorter than n repeats nothing.
    """
    grams = [tuple(parts[start : start + n]) for start in range(len(parts) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(parts: Sequence[str]) -> int:
    """The units of the longest stretch in which a sequence of units stands at least three times
    in a row: 6 in "a b a b a b c", 0 where nothing does."""
    numbers = {part: number for number, part in enumerate(dict.fromkeys(parts))}
    codes = np.array([numbers[part] for part in parts])
    longest = 0
    for period in range(1, len(codes) // MIN_TURNS + 1):
        # Where a unit is the one that stood a period before: runs of it, by the places between.
        breaks = np.flatnonzero(codes[period:] != codes[:-period])
        runs = np.diff(breaks, prepend=-1, append=len(codes) - period) - 1
        run = int(runs.max(initial=0))
        if run >= (MIN_TURNS - 1) * period:
            longest = max(longest, run + period)
    return longest
