"""Is a stage different from the base? Both are measured on the same items, and compared in pairs.

The standard error of an accuracy over 25 questions is 9 percentage points, but most of it is the
questions': a hard one is hard for every stage. The differences of the same items vary less.

    item        1    2    3    4    5
    base        1    1    0    1    0
    stage       1    0    0    0    0
    difference  0   -1    0   -1    0     mean -0.4

If the stage were no different, each difference could as well have the other sign. The p-value is
the share of all choices of signs whose mean is at least as far from zero (Fisher's randomization
test; for right and wrong answers it is McNemar's). A report makes dozens of comparisons, so LEVEL
is stricter than the usual 0.05.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

LEVEL = 0.01  # a p-value below it is a measurable difference
ROUNDS = 9999  # of random signs


class Baseline:
    """The base's values by measure; later values of the same measure are compared with them."""

    def __init__(self) -> None:
        self._values: dict[Hashable, np.ndarray] = {}

    def compare(self, key: Hashable, values: Sequence[float]) -> dict[str, Any]:
        """Return the mean of the values of all items, and their difference from the first call's.

        The rows of a table of stages: `items`, `mean`, `error` (standard error), and of the
        differences `change`, `change_error` and `p`, which are None in the first call. A NaN is an
        item that has no value; it counts in neither.
        """
        own = np.asarray(values, dtype=np.float64)
        base = self._values.setdefault(key, own)
        row = {**summarize(own), "change": None, "change_error": None, "p": None}
        if base is own:
            return row
        if base.shape != own.shape:
            raise ValueError(f"{key}: {len(own)} items, but the base has {len(base)}")
        # Rounding has a direction, too: the test would find it between two orders of a sum.
        difference = np.where(np.isclose(own, base, rtol=1e-5, atol=1e-6), 0, own - base)
        change = summarize(difference)
        return {
            **row,
            "change": change["mean"],
            "change_error": change["error"],
            "p": sign_test(difference),
        }


def is_measurable(row: Mapping[str, Any]) -> bool:
    """Return whether a row of `Baseline.compare` differs from the base by more than chance."""
    return row["p"] is not None and row["p"] < LEVEL


def summarize(values: np.ndarray) -> dict[str, Any]:
    """Return the number of `items` that are no NaN, their `mean` and its standard `error`.

    Both are None if there are too few items for them.
    """
    known = values[~np.isnan(values)]
    count = len(known)
    return {
        "items": count,
        "mean": float(known.mean()) if count else None,
        "error": float(known.std(ddof=1) / np.sqrt(count)) if count > 1 else None,
    }


def sign_test(differences: np.ndarray) -> float:
    """Return the p-value of a mean difference of zero, two-sided, by random signs."""
    known = differences[~np.isnan(differences) & (differences != 0)]
    if not len(known):
        return 1.0
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(ROUNDS, len(known)))
    # Sums of the same numbers in another order differ in the last digit.
    as_far = np.abs(signs @ known) >= abs(known.sum()) * (1 - 1e-9)
    return float((1 + as_far.sum()) / (1 + ROUNDS))
