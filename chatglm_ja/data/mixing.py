"""Which documents are trained on, in which order: exact shares, a fixed validation set, repeats.

Everything is decided on token counts, before a token is moved, and from a seed: the result does
not depend on how many processes read the corpus.
"""

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

log = logging.getLogger(__name__)

# At most one token in so many is kept for validation, however small the corpus.
VALIDATION_PART = 20
# A rest of validation tokens that is not worth looking for a document that fits.
SMALL_REST = 16
# Nor are more documents than these looked at.
MAX_LOOKED_AT = 200_000


@dataclass(frozen=True)
class Draw:
    """Documents in the order in which they are packed, and how many tokens of each; int64."""

    document: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Documents that fill a share of the tokens together: those of a language, or of a source."""

    name: str
    documents: np.ndarray
    tokens: int
    budget: int


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to the shares that add up to `total` (largest remainders)."""
    exact = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    whole = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: total - sum(whole.values())]:
        whole[name] += 1
    return whole


def choose_validation(
    lengths: np.ndarray, digests: np.ndarray, tokens: int, name: str
) -> np.ndarray:
    """Indices of documents of at most `tokens` tokens, and at most one in VALIDATION_PART.

    The documents of the smallest digests: the choice depends on the texts alone, and a larger
    corpus changes little of it.
    """
    limit = min(tokens, int(lengths.sum()) // VALIDATION_PART)
    chosen: list[int] = []
    for index in np.lexsort(digests.T[::-1])[:MAX_LOOKED_AT].tolist():
        if limit < SMALL_REST:
            break
        if lengths[index] <= limit:
            chosen.append(index)
            limit -= int(lengths[index])
    if tokens and not chosen:
        log.warning("%s: too few documents to keep one of them for validation", name)
    return np.array(sorted(chosen), dtype=np.int64)


def build_pools(
    sources: Sequence[Source],
    shares: Mapping[str, float],
    total_tokens: int,
    documents: np.ndarray,
    source_of: np.ndarray,
    length_of: np.ndarray,
) -> list[Pool]:
    """The pools and their budgets of tokens, which add up to `total_tokens`.

    `documents` are those that may be used; `source_of` and `length_of` are of all.
    """
    result = []
    for language, budget in apportion(total_tokens, shares).items():
        mine = [n for n, source in enumerate(sources) if source.language == language]
        weights = {str(n): sources[n].weight for n in mine}
        if None in weights.values():
            groups = [(language, mine, budget)]
        else:
            parts = apportion(budget, {name: weight or 0 for name, weight in weights.items()})
            groups = [(sources[n].title, [n], parts[str(n)]) for n in mine]
        for name, members, part in groups:
            chosen = documents[np.isin(source_of[documents], members)]
            result.append(Pool(name, chosen, int(length_of[chosen].sum()), part))
    return result


def check_budgets(pools: Sequence[Pool], total_tokens: int, max_repeats: float) -> None:
    """DataError when a pool cannot fill its budget, with what would do."""
    lacking = [pool for pool in pools if pool.tokens * max_repeats < pool.budget]
    if not lacking:
        return
    unusable = [pool.name for pool in lacking if not pool.tokens]
    if unusable:
        raise DataError(
            f"{', '.join(unusable)}: no text is left to train on after the filters and the choice "
            "for validation: look at --min-characters, --check-language and --near-duplicates, or "
            "add sources"
        )
    exact = min(total_tokens * pool.tokens * max_repeats / pool.budget for pool in lacking)
    enough = max(int(exact) - len(pools) + 1, 1)  # budgets are rounded
    found = "; ".join(
        f"{pool.name} has {pool.tokens:,} tokens for a share of {pool.budget:,}" for pool in lacking
    )
    raise DataError(
        f"{found}, with --max-repeats {max_repeats:g}: lower --total-tokens to {enough:,}, add "
        "sources, or raise --max-repeats"
    )


def draw_documents(pools: Sequence[Pool], length_of: np.ndarray, seed: int) -> Draw:
    """Fill every pool's budget and interleave the pools evenly.

    A pool is drawn from in passes, each in an order of its own; the last document is cut where
    the budget is full. `length_of` are the tokens of all documents. Interleaved so that at every
    point of the result each pool has given the same part of its budget, to within a document.
    """
    documents, lengths, places = [], [], []
    for pool in pools:
        rng = np.random.default_rng([seed, zlib.crc32(pool.name.encode())])
        passes, left = [], pool.budget
        while left > 0:
            order = rng.permutation(pool.documents)
            before = np.cumsum(length_of[order], dtype=np.int64) - length_of[order]
            order = order[before < left]
            passes.append(order)
            left -= int(length_of[order].sum())
        chosen = np.concatenate([np.zeros(0, dtype=np.int64), *passes])
        sizes = length_of[chosen].astype(np.int64)
        if len(sizes):
            sizes[-1] += min(left, 0)
        documents.append(chosen)
        lengths.append(sizes)
        places.append((np.cumsum(sizes) - sizes) / max(pool.budget, 1))
    order = np.argsort(np.concatenate(places), kind="stable")
    return Draw(np.concatenate(documents)[order], np.concatenate(lengths)[order])
