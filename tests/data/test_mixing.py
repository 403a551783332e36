"""Mixing: budgets that add up, exact shares at every point, a stable validation set."""

from typing import Any

import numpy as np
import pytest

from chatglm_ja.data import mixing
from chatglm_ja.data.mixing import Pool
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source

SHARES = {"ja": 0.76, "zh": 0.12, "en": 0.12}


def make_corpus(sizes: list[int], high: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return the source and length of documents; `sizes` has the number of each source."""
    rng = np.random.default_rng(0)
    source_of = np.repeat(np.arange(len(sizes)), sizes)
    return source_of, rng.integers(3, high, len(source_of)).astype(np.int32)


def make_pools(sources: list[Source], sizes: list[int], total: int, **changes: Any) -> Any:
    source_of, length_of = make_corpus(sizes)
    documents = np.arange(len(source_of))
    shares = changes.get("shares", SHARES)
    pools = mixing.build_pools(sources, shares, total, documents, source_of, length_of)
    return pools, source_of, length_of


LANGUAGES = [Source(language, language) for language in SHARES]


def test_apportioned_parts_are_whole_and_add_up() -> None:
    assert mixing.apportion(100, SHARES) == {"ja": 76, "zh": 12, "en": 12}
    assert mixing.apportion(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    for total in range(200):
        assert sum(mixing.apportion(total, SHARES).values()) == total


def test_shares_are_exact_and_interleaved() -> None:
    pools, source_of, length_of = make_pools(LANGUAGES, [4000, 900, 900], 100_000)
    drawn = mixing.draw_documents(pools, length_of, seed=0)
    owner = source_of[drawn.document]
    tokens = np.array([drawn.length[owner == n].sum() for n in range(3)])
    assert tokens.tolist() == [76_000, 12_000, 12_000]
    assert len(set(drawn.document.tolist())) == len(drawn.document)
    # Every document whole, but the last of each language.
    assert (drawn.length != length_of[drawn.document]).sum() <= 3
    for part in (0.1, 0.35, 0.5, 0.9):
        prefix = np.cumsum(drawn.length) <= part * 100_000
        taken = np.array([drawn.length[prefix & (owner == n)].sum() for n in range(3)])
        assert abs(taken / taken.sum() - [0.76, 0.12, 0.12]).max() < 0.005


def test_the_seed_decides_the_draw() -> None:
    pools, _, length_of = make_pools(LANGUAGES, [4000, 900, 900], 100_000)
    first, same, other = (mixing.draw_documents(pools, length_of, seed) for seed in (0, 0, 1))
    assert (first.document == same.document).all()
    assert first.document.tolist() != other.document.tolist()


def test_a_pool_is_repeated_evenly_up_to_its_limit() -> None:
    length_of = np.full(100, 10, dtype=np.int32)
    pool = Pool("ja", np.arange(100), 1000, 2500)
    drawn = mixing.draw_documents([pool], length_of, seed=0)
    uses = np.bincount(drawn.document, minlength=100)
    assert drawn.length.sum() == 2500
    assert set(uses.tolist()) == {2, 3}
    mixing.check_budgets([pool], 2500, max_repeats=2.5)
    with pytest.raises(
        DataError,
        match=r"ja has 1,000 tokens for a share of 2,500, with --max-repeats 2: lower "
        r"--total-tokens to 2,000, add sources, or raise --max-repeats",
    ):
        mixing.check_budgets([pool], 2500, max_repeats=2)


def test_every_shortage_is_named_and_the_suggested_total_is_enough() -> None:
    pools, _, _ = make_pools(LANGUAGES, [2000, 30, 10], 50_000)
    with pytest.raises(
        DataError, match=r"zh has .*; en has .* lower --total-tokens to ([\d,]+)"
    ) as e:
        mixing.check_budgets(pools, 50_000, 1.0)
    enough = int(str(e.value).split("--total-tokens to ")[1].split(", add")[0].replace(",", ""))
    fitting, _, _ = make_pools(LANGUAGES, [2000, 30, 10], enough)
    mixing.check_budgets(fitting, enough, 1.0)


def test_weights_divide_a_language_among_its_sources() -> None:
    sources = [
        Source("ja", "wiki", weight=3),
        Source("ja", "books", weight=1),
        Source("zh", "zh"),
        Source("zh", "more"),
    ]
    pools, source_of, length_of = make_pools(
        sources, [500, 2000, 100, 100], 8000, shares={"ja": 0.5, "zh": 0.5}
    )
    assert [(pool.name, pool.budget) for pool in pools] == [
        ("ja/wiki", 3000), ("ja/books", 1000), ("zh", 4000),
    ]  # fmt: skip
    drawn = mixing.draw_documents(pools, length_of, 0)
    owner = source_of[drawn.document]
    assert [int(drawn.length[owner == n].sum()) for n in range(2)] == [3000, 1000]
    assert drawn.length[owner >= 2].sum() == 4000


def test_the_validation_set_is_bounded_and_depends_on_the_texts_alone() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 60, 3000)
    digests = rng.integers(0, 2**63, (3000, 2), dtype=np.uint64)
    chosen = mixing.choose_validation(lengths, digests, 2000, "ja")
    assert 2000 - mixing.SMALL_REST <= lengths[chosen].sum() <= 2000
    # The same texts in another order: the same documents.
    order = rng.permutation(3000)
    again = mixing.choose_validation(lengths[order], digests[order], 2000, "ja")
    assert sorted(order[again].tolist()) == chosen.tolist()
    # A larger corpus keeps most of it: what changes is at its end.
    most = mixing.choose_validation(lengths[:2900], digests[:2900], 2000, "ja")
    assert len(set(most.tolist()) & set(chosen.tolist())) > 0.8 * len(chosen)
    # A small corpus is not used up.
    few = mixing.choose_validation(lengths[:100], digests[:100], 2000, "ja")
    assert lengths[few].sum() <= lengths[:100].sum() / 20


def test_too_few_documents_for_validation_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    digests = np.array([[1, 2]], dtype=np.uint64)
    assert len(mixing.choose_validation(np.array([50]), digests, 100, "en")) == 0
    assert "en: too few documents" in caplog.text
