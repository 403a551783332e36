"""Loss curves: a known power law is found again; runs too short for one are drawn all the same."""

from pathlib import Path

import numpy as np
import pytest

from chatglm_ja.training import loss_plot


def test_a_known_power_law_is_found_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    history = [
        {"step": step, "loss": 20 * (1000.0 * step) ** -0.12 * rng.normal(1, 0.005)}
        for step in range(10, 500, 10)
    ]
    history += [
        {"step": step, "eval_ja_loss": 3.0, "eval_ja_bits_per_char": 5.0} for step in (0, 490)
    ]
    law = loss_plot.plot_losses(history, 1000, tmp_path)
    assert law is not None
    assert law.exponent == pytest.approx(0.12, abs=0.003)
    assert law.at(4_900_000) == pytest.approx(20 * 4_900_000**-0.12, rel=0.01)
    assert "extrapolated" in law.describe() and "490,000 tokens" in law.describe()
    assert (tmp_path / loss_plot.LOSS_PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_short_or_rising_runs_have_no_law(tmp_path: Path) -> None:
    assert loss_plot.plot_losses([{"step": 0, "eval_ja_loss": 1.0}], 10, tmp_path) is None
    assert loss_plot.plot_losses([{"step": 1, "loss": 3.0}], 10, tmp_path) is None
    rising = [{"step": step, "loss": 1.0 + step} for step in range(1, 30)]
    assert loss_plot.plot_losses(rising, 10, tmp_path) is None
    assert (tmp_path / loss_plot.LOSS_PLOT_FILE).is_file()
