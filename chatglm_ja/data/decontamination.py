"""Overlap of training data with evaluation texts: 13 tokens in a row.

The rule is GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendix C), with tokens instead of words.
A text loses what it shares and 200 characters on either side of it. One that would lose more than
half of itself, or has more than ten such places, is dropped, as is a conversation with any. N-grams
that are mostly digits and punctuation, such as rules and rows of numbers, stand in many texts and
do not count.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from chatglm_ja.bases import families
from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.data.dedup import rolling_hash
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.data.source_reader import SourceReader

OVERLAP_TOKENS = 13
# Tokens of an n-gram that must hold a letter.
MIN_LETTER_TOKENS = 7
MARGIN_CHARACTERS = 200
MAX_CUTS = 10
MIN_REST = 0.5
# The count of texts that lost something, which is not a fate.
CUT_OUT = "evaluation text cut out"
_UNKNOWN = "\ufffd"  # what a part of a character decodes to


def write_overlap_file(config: PrepareDataConfig, folder: Path) -> Path | None:
    """Write the hashes of the evaluation texts' n-grams; return the file, None without texts."""
    if not config.decontaminate:
        return None
    tokenizer = families.load_tokenizer(config.tokenizer)
    reader = SourceReader(config)
    texts = (text for source in config.decontaminate for text in reader.texts(source))
    documents = (ids for text in texts for ids in tokenizer.encode_documents([text]))
    path = folder / "overlap.npy"
    np.save(path, hash_ngrams(documents, tokenizer), allow_pickle=False)
    return path


@functools.cache
def load_overlap(path: Path | None) -> np.ndarray:
    """Return the hashes of `write_overlap_file`, read once per process; none without a file."""
    if path is None:
        return np.zeros(0, np.uint64)
    hashes: np.ndarray = np.load(path, allow_pickle=False)
    return hashes


def hash_ngrams(documents: Iterable[np.ndarray], tokenizer: ModelTokenizer) -> np.ndarray:
    """Return the sorted hashes, uint64, of the n-grams of tokenized texts that hold letters."""
    has_letter = functools.cache(lambda id_: _has_letter(tokenizer.decode([id_])))
    hashes = [np.zeros(0, np.uint64)]
    for ids in documents:
        grams = _hash(ids)
        letters = np.cumsum([0, *map(has_letter, ids.tolist())])
        counts = letters[OVERLAP_TOKENS:] - letters[: len(grams)]
        hashes.append(grams[counts >= MIN_LETTER_TOKENS])
    return np.unique(np.concatenate(hashes))


def _has_letter(text: str) -> bool:
    return any(character.isalpha() or character == _UNKNOWN for character in text)


def _hash(ids: np.ndarray) -> np.ndarray:
    return rolling_hash(ids.astype(np.uint64), OVERLAP_TOKENS)


def find_overlaps(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return where the n-grams of a tokenized text begin whose hashes are known, int64."""
    if not len(known):
        return np.zeros(0, np.int64)
    grams = _hash(ids)
    places = np.searchsorted(known, grams)
    places[places == len(known)] = 0
    return np.flatnonzero(known[places] == grams)


def cut_overlaps(
    text: str, ids: np.ndarray, starts: np.ndarray, tokenizer: ModelTokenizer
) -> str | None:
    """Return a text without the n-grams that begin at `starts` of its ids, and what is near them.

    A line break takes their place. Returns None if too little is left.
    """
    cuts: list[tuple[int, int]] = []  # in characters
    for run in np.split(starts, np.flatnonzero(np.diff(starts) > OVERLAP_TOKENS) + 1):
        # Decoding the ids before it gives the place, except for a few characters.
        edges = run[0], run[-1] + OVERLAP_TOKENS
        begin, end = (len(tokenizer.decode(ids[:edge].tolist())) for edge in edges)
        begin, end = max(begin - MARGIN_CHARACTERS, 0), end + MARGIN_CHARACTERS
        if cuts and begin <= cuts[-1][1]:
            begin, _ = cuts.pop()
        cuts.append((begin, end))
    kept_from = [0, *(end for _, end in cuts)]
    kept_until = [*(begin for begin, _ in cuts), len(text)]
    parts = [text[a:b].strip() for a, b in zip(kept_from, kept_until, strict=True)]
    rest = "\n".join(filter(None, parts))
    return rest if len(cuts) <= MAX_CUTS and len(rest) >= MIN_REST * len(text) else None
