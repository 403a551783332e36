"""The losses of a training run as a picture, with a power law fitted to them.

Loss against tokens is close to a straight line on two logarithmic axes (Kaplan et al. 2020,
arXiv 2001.08361). The line says what more of the same data may bring; it is an extrapolation and
drawn as one: the learning rate has fallen to 0 where the measured part ends.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja import plots
from chatglm_ja.training.validation import curves

LOSS_PLOT_FILE = "loss.png"
# The warm-up and the first steps after it, where the loss falls from its start, are left out.
SKIPPED_SHARE = 0.1
MIN_POINTS = 5


@dataclass(frozen=True)
class PowerLaw:
    """loss = scale * tokens ** -exponent, fitted up to `tokens`."""

    scale: float
    exponent: float
    tokens: int

    def at(self, tokens: float) -> float:
        return float(self.scale * tokens**-self.exponent)

    def describe(self) -> str:
        return (
            f"training loss ~ tokens^-{self.exponent:.3f}, {self.at(self.tokens):.3f} at "
            f"{self.tokens:,} tokens; extrapolated {self.at(2 * self.tokens):.3f} at twice, "
            f"{self.at(10 * self.tokens):.3f} at ten times as many"
        )


def fit(tokens: np.ndarray, losses: np.ndarray) -> PowerLaw | None:
    """Least squares on logarithmic axes; None for too few points, or a loss that does not fall."""
    late = tokens > SKIPPED_SHARE * tokens.max(initial=0)
    if late.sum() < MIN_POINTS or losses.min() <= 0:
        return None
    slope, offset = np.polyfit(np.log(tokens[late]), np.log(losses[late]), 1)
    if slope >= 0:
        return None
    return PowerLaw(math.exp(offset), -float(slope), int(tokens.max()))


def draw_losses(
    axis: Any, history: Sequence[Mapping[str, Any]], tokens_per_step: int = 1, scale: str = "linear"
) -> None:
    """Training and validation losses over the tokens, or over the steps, on one axis."""
    lines = {"training": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]}
    lines |= {f"validation {language}": curve for language, curve in curves(history).items()}
    for label, points in lines.items():
        # Zero has no logarithm.
        shown = [(step * tokens_per_step, loss) for step, loss in points if step or scale != "log"]
        if not shown:
            continue
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1}
        if label == "training":
            style = {"color": "#1d2330"}
        axis.plot(*zip(*shown, strict=True), label=label, **style)


def plot_losses(
    history: Sequence[Mapping[str, Any]], tokens_per_step: int, folder: Path
) -> PowerLaw | None:
    """Draw the Trainer's log as `folder`/loss.png; returns the fitted law, if there is one."""
    points = [
        (entry["step"] * tokens_per_step, entry["loss"]) for entry in history if "loss" in entry
    ]
    if not points:
        return None
    tokens, losses = (np.array(column) for column in zip(*points, strict=True))
    law = fit(tokens, losses)
    figure, axes = plots.make_figure(10, 3.6, ncols=2)
    for axis, scale in zip(axes, ("linear", "log"), strict=True):
        draw_losses(axis, history, tokens_per_step, scale)
        if law is not None:
            ahead = np.geomspace(SKIPPED_SHARE * law.tokens, 10 * law.tokens, 50)
            ahead = ahead if scale == "log" else ahead[ahead <= 2 * law.tokens]
            drawn = [law.at(value) for value in ahead]
            axis.plot(ahead, drawn, ":", color="#c0392b", label="power law, extrapolated")
        axis.set(xscale=scale, yscale=scale, xlabel="tokens", ylabel="nats per token")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False, fontsize=8)
    plots.save_png(figure, folder / LOSS_PLOT_FILE)
    return law
