"""Matplotlib figures whose files are byte-identical from run to run."""

import io
from pathlib import Path
from typing import Any


def make_figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """Make a Matplotlib figure, its size in inches, and return it with its axes.

    `grid` goes to pyplot.subplots (nrows, ncols, ...), which returns several axes as an array.
    """
    import matplotlib

    matplotlib.use("svg")
    # Derive the ids inside an SVG from its content, not from random numbers.
    matplotlib.rcParams["svg.hashsalt"] = "chatglm_ja"
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), **grid)


def save_png(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def to_svg(figure: Any) -> str:
    """Return a figure as an <svg> element, and close it."""
    from matplotlib import pyplot

    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = out.getvalue()
    return svg[svg.index("<svg") :].rstrip()
