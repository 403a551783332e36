"""Exact duplicates, near-duplicates, and overlap with evaluation texts.

Exact duplicates have the same digest. Near-duplicates are found with MinHash and banding (Broder
1997; Lee et al. 2022, arXiv 2107.06499): a text's signature is made from its set of character
5-grams and cut into bands. Texts that agree in a band are candidates, and the share of equal
entries in two signatures estimates their Jaccard similarity:

    signature             128 x uint32 = 32 bands of 4
    candidates            agree in at least one band, as do all but 1 in 10^7 pairs with a
                          similarity of 0.8, and 87% of those with 0.5
    standard deviation    0.035 for an estimate of 0.8

Of texts that are linked, directly or through others, the first is kept. Memory holds one band of
all texts, whatever their length, and the candidate pairs; signatures stay in their files.
"""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import rensa
from tqdm.auto import tqdm

NUM_HASHES = 128
BAND_SIZE = 4
SHINGLE_CHARACTERS = 5
# Length of the n-grams that identify evaluation texts, in tokens (Brown et al. 2020: 13 words).
OVERLAP_TOKENS = 13
_SEED = 42
# Candidate pairs that are compared at a time: 2 x 32 MB of signatures.
PAIRS_AT_ONCE = 2**16
# Odd, from the golden ratio: multiplying by it spreads neighboring values over 64 bits.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def text_digest(content: str | bytes) -> tuple[int, int]:
    """Return 128 bits of BLAKE2b of a text or bytes, as two unsigned 64-bit integers."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    raw = hashlib.blake2b(content, digest_size=16).digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def minhash_signatures(codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return MinHash signatures [texts, NUM_HASHES], uint32.

    `codes` are the code points of all texts, one text after another, and `lengths` their sizes. No
    text may be empty; one shorter than a shingle is a shingle itself.
    """
    starts = np.cumsum(lengths) - lengths
    counts = np.maximum(lengths - SHINGLE_CHARACTERS + 1, 1)
    padded = np.concatenate([codes, np.zeros(SHINGLE_CHARACTERS, codes.dtype)]).astype(np.uint64)
    hashes = rolling_hash(padded, SHINGLE_CHARACTERS)[: len(codes)]
    keep = np.ones(len(codes), dtype=bool)
    is_long = lengths >= SHINGLE_CHARACTERS
    for back in range(1, SHINGLE_CHARACTERS):  # shingles that would reach into the next text
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
    """Return 64-bit hashes of every `size` consecutive values; uint64 [n] -> [n - size + 1]."""
    count = max(0, len(values) - size + 1)
    hashes = values[:count].copy()
    for offset in range(1, size):
        hashes *= _MULTIPLIER
        hashes += values[offset : offset + count]
    hashes ^= hashes >> np.uint64(32)  # the low bits of a product do not depend on the high ones
    hashes *= _MULTIPLIER
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


def find_near_duplicates(
    count: int,
    read_band: Callable[[int], np.ndarray],
    read_signatures: Callable[[np.ndarray], np.ndarray],
    threshold: float,
) -> np.ndarray:
    """Return which of `count` texts are near-duplicates of an earlier one, bool [count].

    `read_band(b)` returns band b of all signatures, [count, BAND_SIZE], and `read_signatures(i)`
    the signatures of some texts, [len(i), NUM_HASHES]. Among texts with an equal band, each is
    compared with its predecessor and with the first.
    """
    bands = NUM_HASHES // BAND_SIZE
    pairs = np.zeros(0, dtype=np.int64)
    new_pairs: list[np.ndarray] = []
    for number in tqdm(range(bands), desc="near-duplicates", unit=" bands"):
        keys = row_hashes(read_band(number))
        order = np.argsort(keys, kind="stable")
        begins = np.diff(keys[order], prepend=keys[order[:1]] + np.uint64(1)) != 0
        run_first = order[np.maximum.accumulate(np.where(begins, np.arange(count), 0))]
        later = np.flatnonzero(~begins)
        # The order is stable, so the first of a pair is the earlier text.
        for earlier in (order[later - 1], run_first[later]):
            new_pairs.append(earlier * count + order[later])
        # Many bands give the same pairs: merge whenever the number of pairs has doubled.
        if sum(map(len, new_pairs)) > len(pairs) or number == bands - 1:
            pairs, new_pairs = np.unique(np.concatenate([pairs, *new_pairs])), []
    parents = np.arange(count)

    def root(index: int) -> int:
        while (parent := int(parents[index])) != index:
            parents[index] = parents[parent]
            index = parent
        return index

    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        first, second = np.divmod(pairs[start : start + PAIRS_AT_ONCE], count)
        alike = (read_signatures(first) == read_signatures(second)).mean(axis=1) >= threshold
        for one, other in zip(first[alike].tolist(), second[alike].tolist(), strict=True):
            low, high = sorted((root(one), root(other)))
            if low != high:
                parents[high] = low
    return parents != np.arange(count)


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each row of unsigned integers [n, k]."""
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        hashes = (hashes + column.astype(np.uint64)) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(32)
    return hashes
