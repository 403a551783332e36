"""Comparisons with the base on the same items, against exact tests."""

import math

import numpy as np
import pytest

from chatglm_ja.evaluation.paired import LEVEL, Baseline, is_measurable, sign_test


def mcnemar(lost: int, won: int) -> float:
    """The exact test: two-sided binomial of the pairs that differ."""
    n, k = lost + won, max(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 2), (8, 1), (10, 0), (5, 15)])
def test_right_and_wrong_answers_are_compared_as_by_mcnemar(lost: int, won: int) -> None:
    differences = np.array([-1.0] * lost + [1.0] * won + [0.0] * 20)
    assert sign_test(differences) == pytest.approx(mcnemar(lost, won), abs=0.015)


def test_the_sign_test_of_any_differences() -> None:
    """Against the enumeration of all signs."""
    differences = np.random.default_rng(3).normal(0.5, 1.0, size=10)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    exact = np.mean(np.abs(differences @ signs) >= abs(differences.sum()) * (1 - 1e-9))
    assert sign_test(differences) == pytest.approx(exact, abs=0.015)


def test_pairs_show_what_the_shares_alone_do_not() -> None:
    """Eight of 25 answers less: within two standard errors of the shares, but not by chance."""
    base = [1.0] * 14 + [0.0] * 11
    worse = [0.0] * 8 + base[8:]
    baseline = Baseline()
    first = baseline.compare("acc", base)
    assert (first["mean"], first["change"], first["p"]) == (0.56, None, None)
    assert not is_measurable(first)
    row = baseline.compare("acc", worse)
    assert row["change"] == pytest.approx(-8 / 25)
    assert row["error"] == pytest.approx(np.std(worse, ddof=1) / 5)
    assert row["p"] < LEVEL
    assert is_measurable(row)
    # As many right answers to other questions: no difference.
    assert not is_measurable(baseline.compare("acc", base[::-1]))
    assert baseline.compare("other", worse)["change"] is None


def test_an_item_without_a_value_counts_in_neither() -> None:
    baseline = Baseline()
    assert baseline.compare("x", [1.0, math.nan, 3.0])["items"] == 2
    row = baseline.compare("x", [2.0, 5.0, math.nan])
    assert (row["items"], row["mean"], row["change"]) == (2, 3.5, 1.0)
    assert row["change_error"] is None  # of one pair
    empty = Baseline().compare("x", [math.nan])
    assert (empty["items"], empty["mean"], empty["error"]) == (0, None, None)
    with pytest.raises(ValueError, match="2 items, but the base has 3"):
        baseline.compare("x", [1.0, 2.0])


def test_rounding_is_no_difference() -> None:
    """Of the same model in another order of additions every value may be a little larger."""
    values = [0.01 + 0.1 * number for number in range(30)]
    baseline = Baseline()
    baseline.compare("x", values)
    row = baseline.compare("x", [value + 2e-8 for value in values])
    assert (row["change"], row["p"]) == (0, 1)
    assert is_measurable(baseline.compare("x", [value + 1e-3 for value in values]))
