"""Exact duplicates, and overlap with evaluation texts.

Exact duplicates have the same digest. A text overlaps with the evaluation texts if it shares 13
consecutive tokens with one of them (Brown et al. 2020, arXiv 2005.14165: 13 words).
"""

import hashlib
from collections.abc import Iterable

import numpy as np

# Length of the n-grams that identify evaluation texts, in tokens.
OVERLAP_TOKENS = 13
# Odd, from the golden ratio: multiplying by it spreads neighboring values over 64 bits.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def text_digest(content: str | bytes) -> tuple[int, int]:
    """Return 128 bits of BLAKE2b of a text or bytes, as two unsigned 64-bit integers."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    raw = hashlib.blake2b(content, digest_size=16).digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def rolling_hash(values: np.ndarray, size: int) -> np.ndarray:
    """Return 64-bit hashes of every `size` consecutive values; uint64 [n] -> [n - size + 1]."""
    count = max(0, len(values) - size + 1)
    hashes = values[:count].copy()
    for offset in range(1, size):
        hashes *= MULTIPLIER
        hashes += values[offset : offset + count]
    hashes ^= hashes >> np.uint64(32)  # the low bits of a product do not depend on the high ones
    hashes *= MULTIPLIER
    return hashes


def overlap_hashes(documents: Iterable[np.ndarray]) -> np.ndarray:
    """Return the sorted hashes of all OVERLAP_TOKENS-grams of tokenized evaluation texts."""
    grams = [rolling_hash(ids.astype(np.uint64), OVERLAP_TOKENS) for ids in documents]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *grams]))


def has_overlap(ids: np.ndarray, known: np.ndarray) -> bool:
    """Return True if a tokenized text shares an OVERLAP_TOKENS-gram with the evaluation texts."""
    grams = rolling_hash(ids.astype(np.uint64), OVERLAP_TOKENS)
    places = np.searchsorted(known, grams)
    places[places == len(known)] = 0
    return len(known) > 0 and bool((known[places] == grams).any())


def mark_repeated(keys: np.ndarray) -> np.ndarray:
    """Return which rows of keys [n, k] equal an earlier row, bool [n]."""
    order = np.lexsort((np.arange(len(keys)), *keys.T))
    ordered = keys[order]
    same = np.zeros(len(keys), dtype=bool)
    if len(keys):
        same[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return same
