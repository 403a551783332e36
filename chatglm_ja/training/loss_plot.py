"""The training and validation losses of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ja import plots
from chatglm_ja.training.validation import curves

LOSS_PLOT_FILE = "loss.png"


def draw_losses(
    axis: Any, history: Sequence[Mapping[str, Any]], tokens_per_step: int = 1, scale: str = "linear"
) -> None:
    """Draw the losses of a Trainer's log on an axis, over the tokens, or by default the steps."""
    lines = {"training": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]}
    lines |= {f"validation {language}": curve for language, curve in curves(history).items()}
    for label, points in lines.items():
        # A logarithmic axis has no place for step 0.
        shown = [(step * tokens_per_step, loss) for step, loss in points if step or scale != "log"]
        if not shown:
            continue
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1}
        if label == "training":
            style = {"color": "#1d2330"}
        axis.plot(*zip(*shown, strict=True), label=label, **style)


def plot_losses(history: Sequence[Mapping[str, Any]], tokens_per_step: int, folder: Path) -> None:
    """Write `folder`/loss.png: the losses of a Trainer's log on linear and on logarithmic axes.

    Writes nothing if no training loss was logged.
    """
    if not any("loss" in entry for entry in history):
        return
    figure, axes = plots.make_figure(10, 3.6, ncols=2)
    for axis, scale in zip(axes, ("linear", "log"), strict=True):
        draw_losses(axis, history, tokens_per_step, scale)
        axis.set(xscale=scale, yscale=scale, xlabel="tokens", ylabel="nats per token")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False, fontsize=8)
    plots.save_png(figure, folder / LOSS_PLOT_FILE)
