"""Exact duplicates, which have the same digest, and hashes of n-grams."""

import hashlib

import numpy as np

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


def mark_repeated(keys: np.ndarray) -> np.ndarray:
    """Return which rows of keys [n, k] equal an earlier row, bool [n]."""
    order = np.lexsort((np.arange(len(keys)), *keys.T))
    ordered = keys[order]
    same = np.zeros(len(keys), dtype=bool)
    if len(keys):
        same[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return same
