"""Choosing the documents to train on, and their order: exact shares, validation set, repeats.

All choices are made from token counts and a seed, before any token is copied, so the result does
not depend on the number of processes.
"""

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

log = logging.getLogger(__name__)

# At most one token in 20 is held out for validation, however small the corpus.
VALIDATION_PART = 20
# The search for validation documents ends when fewer tokens than these are missing,
SMALL_REST = 16
# or after this many documents.
MAX_EXAMINED = 200_000


@dataclass(frozen=True)
class Draw:
    """Documents in the order of packing, and how many tokens of each are used; int64."""

    document: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Documents of a language or of a source, which fill one share of the tokens.

    tokens    in all documents
    budget    tokens to draw
    """

    name: str
    documents: np.ndarray
    tokens: int
    budget: int


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split `total` into whole numbers in proportion to `shares` (largest remainder method)."""
    exact = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    parts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def choose_validation(
    lengths: np.ndarray, digests: np.ndarray, tokens: int, name: str
) -> np.ndarray:
    """Choose validation documents of at most `tokens` tokens in all; return their sorted indices.

    The documents with the smallest digests are chosen, so the choice depends on the texts alone and
    changes little when the corpus grows. It takes at most one token in VALIDATION_PART. `name` is
    for the warning about too few documents.
    """
    limit = min(tokens, int(lengths.sum()) // VALIDATION_PART)
    chosen: list[int] = []
    for index in np.lexsort(digests.T[::-1])[:MAX_EXAMINED].tolist():
        if limit < SMALL_REST:
            break
        if lengths[index] <= limit:
            chosen.append(index)
            limit -= int(lengths[index])
    if tokens and not chosen:
        log.warning("%s: too few documents to hold out one for validation", name)
    return np.array(sorted(chosen), dtype=np.int64)


def build_pools(
    sources: Sequence[Source],
    shares: Mapping[str, float],
    total_tokens: int,
    documents: np.ndarray,
    source_of: np.ndarray,
    length_of: np.ndarray,
) -> list[Pool]:
    """Return pools of documents whose budgets add up to `total_tokens`.

    A language is one pool, or one per source if its sources have weights. `documents` are the
    numbers of those that may be used; `source_of` and `length_of` have an entry for every document.
    """
    pools = []
    for language, budget in apportion(total_tokens, shares).items():
        numbers = [n for n, source in enumerate(sources) if source.language == language]
        weights = {str(n): sources[n].weight for n in numbers}
        if None in weights.values():
            groups = [(language, numbers, budget)]
        else:
            parts = apportion(budget, {name: weight or 0 for name, weight in weights.items()})
            groups = [(sources[n].title, [n], parts[str(n)]) for n in numbers]
        for name, members, part in groups:
            own = documents[np.isin(source_of[documents], members)]
            pools.append(Pool(name, own, int(length_of[own].sum()), part))
    return pools


def check_budgets(pools: Sequence[Pool], total_tokens: int, max_repeats: float) -> None:
    """Raise DataError if a pool cannot fill its budget, naming a total that all can fill."""
    short_pools = [pool for pool in pools if pool.tokens * max_repeats < pool.budget]
    if not short_pools:
        return
    empty_pools = [pool.name for pool in short_pools if not pool.tokens]
    if empty_pools:
        raise DataError(
            f"{', '.join(empty_pools)}: no text is left to train on after the filters and the "
            "validation split: check --min-characters, --check-language and --near-duplicates, or "
            "add sources"
        )
    exact = min(total_tokens * pool.tokens * max_repeats / pool.budget for pool in short_pools)
    enough = max(int(exact) - len(pools) + 1, 1)  # budgets are rounded
    shortages = "; ".join(
        f"{pool.name} has {pool.tokens:,} tokens for a share of {pool.budget:,}"
        for pool in short_pools
    )
    raise DataError(
        f"{shortages}, with --max-repeats {max_repeats:g}: lower --total-tokens to {enough:,}, add "
        "sources, or raise --max-repeats"
    )


def draw_documents(pools: Sequence[Pool], length_of: np.ndarray, seed: int) -> Draw:
    """Draw documents to fill every pool's budget, and interleave the pools evenly.

    A pool is read in epochs, each in a new random order; its last document is cut where the budget
    is full. At every point of the result, each pool has spent the same part of its budget, to
    within a document. `length_of` has the tokens of every document.
    """
    documents, lengths, places = [], [], []
    for pool in pools:
        rng = np.random.default_rng([seed, zlib.crc32(pool.name.encode())])
        epochs, left = [], pool.budget
        while left > 0:
            order = rng.permutation(pool.documents)
            before = np.cumsum(length_of[order], dtype=np.int64) - length_of[order]
            order = order[before < left]
            epochs.append(order)
            left -= int(length_of[order].sum())
        drawn = np.concatenate([np.zeros(0, dtype=np.int64), *epochs])
        sizes = length_of[drawn].astype(np.int64)
        if len(sizes):
            sizes[-1] += min(left, 0)
        documents.append(drawn)
        lengths.append(sizes)
        places.append((np.cumsum(sizes) - sizes) / max(pool.budget, 1))
    order = np.argsort(np.concatenate(places), kind="stable")
    return Draw(np.concatenate(documents)[order], np.concatenate(lengths)[order])
