"""Near-duplicates: MinHash signatures of texts, and the search for texts that are much alike.

The method is MinHash with LSH bands (Broder 1997; Lee et al. 2022, arXiv 2107.06499). A signature
is made from the set of a text's character 5-grams and cut into bands. Texts that agree in a band
are candidates, and the share of equal entries in two signatures estimates their Jaccard similarity:

    characters            letters and digits after NFKC and case folding: layout, punctuation and
                          the width of characters make no difference
    signature             128 x uint32 = 32 bands of 4
    candidates            agree in at least one band, as do all but 1 in 10^7 pairs with a
                          similarity of 0.8, and 87% of those with 0.5
    standard deviation    0.035 for an estimate of 0.8

Of texts that are linked, directly or through others, the first is kept. A band is a task of the
process pool, first to find candidates and then to compare them. Signatures stay in their files,
of which each task reads its band once, so the time grows with the number of documents.
"""

import functools
import itertools
import os
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rensa
from tqdm.auto import tqdm

from chatglm_ja.data import language_id, parallel
from chatglm_ja.data.dedup import MULTIPLIER, rolling_hash
from chatglm_ja.errors import DataError

NUM_HASHES = 128
BAND_SIZE = 4
BANDS = NUM_HASHES // BAND_SIZE
SHINGLE_CHARACTERS = 5
_SEED = 42
# A pair of documents is one integer of 64 bits.
MAX_DOCUMENTS = 2**32
_HALF, _LOW_HALF = np.uint64(32), np.uint64(2**32 - 1)
_ENTRIES = struct.Struct(f"<{NUM_HASHES}I")
# What is worked on at a time fits the processor's cache.
CHARACTERS_AT_ONCE = DOCUMENTS_AT_ONCE = PAIRS_AT_ONCE = 2**16
# A process takes as long to start as to search this many documents.
DOCUMENTS_PER_PROCESS = 500_000
# Memory of a process, for each document. Of one machine's processes, more than four would need more
# than the index of the documents.
BYTES_PER_DOCUMENT = 20
MAX_PROCESSES = 4

# By code point: what is compared of a character, see `_fold_alone`.
_DROPPED, _IN_CONTEXT, _UNKNOWN = 0, 2**31, 2**32 - 1
_folded = np.full(0x110000, _UNKNOWN, dtype=np.uint32)


def fold_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the letters and digits of NFKC-normalized, case-folded texts.

    They are code points, uint32, one text after another, and the number in each text, int64. A text
    with fewer of them than a shingle has, such as a row of symbols, stays whole. No text may be
    empty.
    """
    codes = language_id.code_points(texts)
    folded = _fold_alone(codes)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    if folded.max(initial=0) >= _IN_CONTEXT:
        is_wanted = np.logical_or.reduceat(folded >= _IN_CONTEXT, starts)
        texts = [
            unicodedata.normalize("NFKC", text).casefold() if wanted else text
            for text, wanted in zip(texts, is_wanted, strict=True)
        ]
        codes = language_id.code_points(texts)
        folded = _fold_alone(codes) & ~np.uint32(_IN_CONTEXT)
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        is_normal_letter = np.repeat(is_wanted, lengths) & (folded != _DROPPED)
        folded = np.where(is_normal_letter, codes, folded)
    is_letter = folded != _DROPPED
    counts = np.add.reduceat(is_letter, starts, dtype=np.int64) if len(texts) else lengths
    for number in np.flatnonzero(counts < SHINGLE_CHARACTERS):
        whole = slice(starts[number], starts[number] + lengths[number])
        folded[whole], is_letter[whole], counts[number] = codes[whole], True, lengths[number]
    return folded.compress(is_letter), counts


def _fold_alone(codes: np.ndarray) -> np.ndarray:
    """Return what each character becomes alone, or _DROPPED; uint32.

    Python's normalization takes longer than all else that is done with a text. Most characters do
    not depend on their neighbors, so they are looked up, each normalized once. _IN_CONTEXT marks
    the others: those that become several, and those that NFKC may compose with one before them.
    """
    folded = _folded.take(codes)
    if folded.max(initial=0) < _UNKNOWN:
        return folded
    for code in np.unique(codes[folded == _UNKNOWN]).tolist():
        character = chr(code)
        normal = unicodedata.normalize("NFKC", character).casefold()
        letters = [letter for letter in normal if letter.isalnum()]
        _folded[code] = ord(letters[0]) if letters else _DROPPED
        first = unicodedata.normalize("NFKD", character)[0]
        is_jamo = 0x1100 <= ord(first) < 0x1200
        if len(letters) > 1 or is_jamo or unicodedata.category(first)[0] == "M":
            _folded[code] = _IN_CONTEXT | (code if character.isalnum() else _DROPPED)
    return _folded.take(codes)


def minhash_signatures(texts: Sequence[str]) -> np.ndarray:
    """Return MinHash signatures [texts, NUM_HASHES], uint32.

    No text may be empty; one shorter than a shingle is a shingle itself.
    """
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    cuts = [0, *np.flatnonzero(np.diff(ends // CHARACTERS_AT_ONCE)) + 1, len(texts)]
    return np.concatenate([_sign(texts[start:end]) for start, end in itertools.pairwise(cuts)])


def _sign(texts: Sequence[str]) -> np.ndarray:
    letters, lengths = fold_texts(texts)
    starts = np.cumsum(lengths) - lengths
    counts = np.maximum(lengths - SHINGLE_CHARACTERS + 1, 1)
    padding = np.zeros(SHINGLE_CHARACTERS, dtype=letters.dtype)
    padded = np.concatenate([letters, padding], dtype=np.uint64)
    hashes = rolling_hash(padded, SHINGLE_CHARACTERS)[: len(letters)]
    keep = np.ones(len(letters), dtype=bool)
    is_long = lengths >= SHINGLE_CHARACTERS
    for back in range(1, SHINGLE_CHARACTERS):  # shingles that would reach into the next text
        keep[(starts + lengths - back)[is_long]] = False
    for index in np.flatnonzero(~is_long):
        start, size = starts[index], lengths[index]
        keep[start + 1 : start + size] = False
        alone = np.zeros(SHINGLE_CHARACTERS, dtype=np.uint64)
        alone[:size] = letters[start : start + size]
        hashes[start] = rolling_hash(alone, SHINGLE_CHARACTERS)[0]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes.compress(keep), offsets, NUM_HASHES, _SEED
    )
    # A third of the time of np.array on lists.
    packed = b"".join(itertools.starmap(_ENTRIES.pack, matrix.to_rows()))
    return np.frombuffer(packed, dtype="<u4").reshape(len(lengths), NUM_HASHES)


@dataclass(frozen=True)
class SignatureFiles:
    """Files of signatures, and the documents in them that are searched.

    paths      files of uint32 [NUM_HASHES, documents], little-endian
    sizes      documents of each file
    chosen     which of all documents are searched, a bit for each (np.packbits)
    """

    paths: Sequence[Path]
    sizes: Sequence[int]
    chosen: np.ndarray

    def chosen_documents(self) -> np.ndarray:
        """Return which of all documents are searched, bool."""
        return np.unpackbits(self.chosen, count=sum(self.sizes)).astype(bool)

    def read_band(self, band: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield a band of the documents that are searched, in parts [BAND_SIZE, documents].

        With each comes its place among these documents. Raises DataError if a file is too short.
        """
        is_chosen = self.chosen_documents()
        parts: list[np.ndarray] = []
        start = end = searched = 0
        for number, (path, size) in enumerate(zip(self.paths, self.sizes, strict=True), 1):
            if size:
                entries = _read_entries(path, band * BAND_SIZE * size, BAND_SIZE * size)
                parts.append(entries.reshape(BAND_SIZE, size))
            end += size
            if end > start and (end - start >= DOCUMENTS_AT_ONCE or number == len(self.paths)):
                part = np.concatenate(parts, axis=1).compress(is_chosen[start:end], axis=1)
                yield slice(searched, searched + part.shape[1]), part
                searched += part.shape[1]
                start, parts = end, []


def _read_entries(path: Path, start: int, count: int) -> np.ndarray:
    """Read a part of a file of signatures; of many small files this takes a third of fromfile."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.pread(descriptor, count * 4, start * 4)
    finally:
        os.close(descriptor)
    if len(content) != count * 4:
        raise DataError(f"{path} is too short: remove its folder and re-run the command")
    return np.frombuffer(content, dtype="<u4")


def find_near_duplicates(
    files: SignatureFiles, threshold: float, processes: int, scratch: Path
) -> np.ndarray:
    """Return which of the searched documents are near-duplicates of an earlier one, bool.

    `threshold` is the share of equal entries in the signatures of two documents. Among documents
    with an equal band, each is compared with its predecessor and with the first. `scratch` is a
    file for the pairs to compare, removed at the end. There are at most MAX_PROCESSES processes, or
    on a cluster as many as its memory holds. Raises DataError for more than MAX_DOCUMENTS.
    """
    count = int(files.chosen_documents().sum())
    if count > MAX_DOCUMENTS:
        raise DataError(
            f"near-duplicates are searched among at most {MAX_DOCUMENTS:,} documents, found "
            f"{count:,}: pass --near-duplicates 0, or fewer sources"
        )
    processes = min(processes, MAX_PROCESSES, 1 + count // DOCUMENTS_PER_PROCESS)
    task_bytes = BYTES_PER_DOCUMENT * count
    pairs = np.zeros(0, dtype=np.uint64)
    new_pairs: list[np.ndarray] = []
    with tqdm(total=2 * BANDS, desc="near-duplicates", unit=" bands") as bar:
        find = functools.partial(_find_candidates, files, count)
        for found in parallel.map_in_order(find, range(BANDS), processes, task_bytes):
            new_pairs.append(found)
            # Many bands give the same pairs: merge whenever the number of pairs has doubled.
            if sum(map(len, new_pairs)) > len(pairs):
                pairs, new_pairs = _distinct([pairs, *new_pairs]), []
            bar.update()
        pairs = _distinct([pairs, *new_pairs])
        if not len(pairs):
            return np.zeros(count, dtype=bool)
        pairs.tofile(scratch)
        equal = np.zeros(len(pairs), dtype=np.uint8)
        compare = functools.partial(_count_equal, files, count, scratch)
        for counts in parallel.map_in_order(compare, range(BANDS), processes, task_bytes):
            equal += counts
            bar.update()
    scratch.unlink()
    return _find_linked(count, pairs[equal / NUM_HASHES >= threshold])


def _join(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    return earlier << _HALF | later


def _split(pairs: np.ndarray) -> list[np.ndarray]:
    return [half.astype(np.int64) for half in (pairs >> _HALF, pairs & _LOW_HALF)]


def _distinct(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return all distinct pairs, sorted; np.unique, which hashes, takes 100 times as long."""
    pairs = np.concatenate(parts)
    pairs.sort()
    return pairs[np.diff(pairs, prepend=~pairs[:1]) != 0]


def _find_candidates(files: SignatureFiles, count: int, band: int) -> np.ndarray:
    """Return pairs of documents with an equal band, sorted: uint64, see `_join`."""
    # The low bits of a key are the document's number, the others a hash of its band. Sorting keys
    # is many times faster than sorting numbers by their hashes. Documents whose hashes differ only
    # in the low bits become candidates, too: about one for each document if there are 2^32.
    low = np.uint64((1 << (count - 1).bit_length()) - 1)
    keys = np.arange(count, dtype=np.uint64)
    for place, part in files.read_band(band):
        keys[place] |= row_hashes(part.T) & ~low
    keys.sort()
    # The first of a pair is the earlier document: equal hashes are in the order of their numbers.
    parts = [np.zeros(0, dtype=np.int64)]
    for start in range(1, count, DOCUMENTS_AT_ONCE):
        block = slice(start, start + DOCUMENTS_AT_ONCE)
        previous = slice(start - 1, min(start - 1 + DOCUMENTS_AT_ONCE, count - 1))
        parts.append(np.flatnonzero((keys[block] ^ keys[previous]) <= low) + start)
    later = np.concatenate(parts)
    begins = np.diff(later, prepend=-1) != 1
    first = np.maximum.accumulate(np.where(begins, later - 1, 0))
    last = keys[later] & low
    return _distinct([_join(keys[places] & low, last) for places in (later - 1, first)])


def _count_equal(files: SignatureFiles, count: int, pairs_path: Path, band: int) -> np.ndarray:
    """Return how many entries of a band are equal in each of the pairs in a file, uint8."""
    rows = np.empty((count, BAND_SIZE), dtype=np.uint32)
    for place, part in files.read_band(band):
        rows[place] = part.T
    pairs = np.memmap(pairs_path, dtype=np.uint64, mode="r")
    # Items of 16 bytes, whatever they stand for, are gathered eight times as fast as rows.
    items = rows.view(np.complex128)[:, 0]
    counts = np.empty(len(pairs), dtype=np.uint8)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        block = slice(start, start + PAIRS_AT_ONCE)
        earlier, later = (items[half].view(np.uint32) for half in _split(pairs[block]))
        counts[block] = np.bitwise_count((earlier == later).view(np.uint32))
    return counts


def _find_linked(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return which of `count` documents are linked by pairs to an earlier one, bool."""
    first = np.arange(count)  # converges to the first document that each is linked to
    one, other = _split(pairs)
    while (first[one] != first[other]).any():
        lower = np.minimum(first[one], first[other])
        np.minimum.at(first, first[one], lower)
        np.minimum.at(first, first[other], lower)
        first = first[first]
    return first != np.arange(count)


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each row of unsigned integers [n, k]."""
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        hashes = (hashes + column.astype(np.uint64)) * MULTIPLIER
        hashes ^= hashes >> np.uint64(32)
    return hashes
