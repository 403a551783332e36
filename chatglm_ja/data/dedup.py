"""Texts that a corpus should not hold twice, and texts that an evaluation must not have seen.

Exact duplicates have the same digest. Near duplicates are found as is usual (Broder 1997; Lee et
al. 2022, arXiv 2107.06499): MinHash signatures of the set of character 5-grams, cut into bands;
texts that agree in a band are candidates, and the share of equal places in the signatures
estimates their Jaccard similarity:

    signature  128 x uint32  =  32 bands of 4        of texts whose similarity is
    a candidate agrees in one band or more           0.8: all but 1 in 10^7, 0.5: 87%
    an estimate of 0.8 has a deviation of 0.035

Of texts that are linked, directly or through others, the first stays. Held in memory are one band
of all texts, whatever their length, and the pairs of candidates; signatures stay in their files.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import rensa

NUM_HASHES = 128
BAND_SIZE = 4
SHINGLE_CHARACTERS = 5
# Evaluation texts are recognised by this many tokens in a row (Brown et al. 2020 took 13 words).
OVERLAP_TOKENS = 13
_SEED = 42
# Signatures that are held to be compared: 2 x 32 MB.
PAIRS_AT_ONCE = 2**16
# Odd, from the golden ratio: multiplying by it spreads neighbouring values over 64 bits.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def text_digest(content: str | bytes) -> tuple[int, int]:
    """128 bits of BLAKE2b of a text or of bytes, as two unsigned integers of 64."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    raw = hashlib.blake2b(content, digest_size=16).digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def minhash_signatures(codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """MinHash signatures [texts, NUM_HASHES], uint32, of texts given as code points in a row.

    No text is empty; one shorter than a shingle has one: itself.
    """
    starts = np.cumsum(lengths) - lengths
    counts = np.maximum(lengths - SHINGLE_CHARACTERS + 1, 1)
    # Beyond the end of the last text, zeros.
    padded = np.concatenate([codes, np.zeros(SHINGLE_CHARACTERS, codes.dtype)]).astype(np.uint64)
    hashes = rolling_hash(padded, SHINGLE_CHARACTERS)[: len(codes)]
    keep = np.ones(len(codes), dtype=bool)
    is_long = lengths >= SHINGLE_CHARACTERS
    for back in range(1, SHINGLE_CHARACTERS):  # shingles that would go over into the next text
        keep[(starts + lengths - back)[is_long]] = False
    for index in np.flatnonzero(~is_long):
        start, size = starts[index], lengths[index]
        keep[start + 1 : start + size] = False
        alone = np.zeros(SHINGLE_CHARACTERS, dtype=np.uint64)
        alone[:size] = codes[start : start + size]
        hashes[start] = rolling_hash(alone, SHINGLE_CHARACTERS)[0]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes[keep], offsets, NUM_HASHES, _SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(lengths), NUM_HASHES)


def rolling_hash(values: np.ndarray, size: int) -> np.ndarray:
    """64-bit hashes of every `size` values in a row; values uint64 [n], result [n - size + 1]."""
    count = max(0, len(values) - size + 1)
    hashes = values[:count].copy()
    for offset in range(1, size):
        hashes *= _MULTIPLIER
        hashes += values[offset : offset + count]
    hashes ^= hashes >> np.uint64(32)  # the low bits of a product know nothing of the high ones
    hashes *= _MULTIPLIER
    return hashes


def overlap_hashes(documents: Iterable[np.ndarray]) -> np.ndarray:
    """The sorted hashes of all OVERLAP_TOKENS-grams of tokenised evaluation texts."""
    grams = [rolling_hash(ids.astype(np.uint64), OVERLAP_TOKENS) for ids in documents]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *grams]))


def has_overlap(ids: np.ndarray, known: np.ndarray) -> bool:
    """Whether a tokenised text shares OVERLAP_TOKENS tokens in a row with the evaluation texts."""
    grams = rolling_hash(ids.astype(np.uint64), OVERLAP_TOKENS)
    places = np.searchsorted(known, grams)
    places[places == len(known)] = 0
    return len(known) > 0 and bool((known[places] == grams).any())


def mark_repeated(keys: np.ndarray) -> np.ndarray:
    """Which rows of keys [n, k] have occurred in an earlier row, bool [n]."""
    order = np.lexsort((np.arange(len(keys)), *keys.T))
    ordered = keys[order]
    same = np.zeros(len(keys), dtype=bool)
    if len(keys):
        same[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return same


def find_near_duplicates(
    count: int,
    band: Callable[[int], np.ndarray],
    signatures_of: Callable[[np.ndarray], np.ndarray],
    threshold: float,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> np.ndarray:
    """Which of `count` texts are near duplicates of an earlier one, bool [count].

    `band(b)` gives columns b * BAND_SIZE and on of all signatures, [count, BAND_SIZE];
    `signatures_of(i)` those of some texts, [len(i), NUM_HASHES]. Compared are, in every band, the
    neighbours in a run of equal texts and each with the run's first.
    """
    pairs = np.zeros(0, dtype=np.int64)
    found: list[np.ndarray] = []
    for number in progress(range(NUM_HASHES // BAND_SIZE)):
        keys = row_hashes(band(number))
        order = np.argsort(keys, kind="stable")
        begins = np.diff(keys[order], prepend=keys[order[:1]] + np.uint64(1)) != 0
        run_first = order[np.maximum.accumulate(np.where(begins, np.arange(count), 0))]
        later = np.flatnonzero(~begins)
        # The order is stable, so the first of a pair is the earlier text.
        for earlier in (order[later - 1], run_first[later]):
            found.append(earlier * count + order[later])
        # The same pairs come from many bands; merged when there are as many again, or at the end.
        if sum(map(len, found)) > len(pairs) or number == NUM_HASHES // BAND_SIZE - 1:
            pairs, found = np.unique(np.concatenate([pairs, *found])), []
    parents = np.arange(count)

    def root(index: int) -> int:
        while (parent := int(parents[index])) != index:
            parents[index] = parents[parent]
            index = parent
        return index

    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        first, second = np.divmod(pairs[start : start + PAIRS_AT_ONCE], count)
        alike = (signatures_of(first) == signatures_of(second)).mean(axis=1) >= threshold
        for one, other in zip(first[alike].tolist(), second[alike].tolist(), strict=True):
            low, high = sorted((root(one), root(other)))
            if low != high:
                parents[high] = low
    return parents != np.arange(count)


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of unsigned integers [n, k]."""
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        hashes = (hashes + column.astype(np.uint64)) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(32)
    return hashes


def describe_method(threshold: float) -> dict[str, Any]:
    """The method, for a report."""
    return {
        "threshold": threshold,
        "hashes": NUM_HASHES,
        "bands": NUM_HASHES // BAND_SIZE,
        "shingle_characters": SHINGLE_CHARACTERS,
    }
