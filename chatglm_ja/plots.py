"""Matplotlib figures that are reproducible byte by byte."""

import io
from pathlib import Path
from typing import Any


def figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A matplotlib figure, in inches, and its axes; `svg` turns it into a picture.

    `grid` is what pyplot.subplots takes, as nrows and ncols: several axes are an array.
    """
    import matplotlib

    matplotlib.use("svg")
    # Ids inside the picture from its content, not drawn: the same input gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "chatglm_ja"
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), **grid)


def save_png(drawing: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG: the same figure gives the same bytes."""
    drawing.tight_layout()
    drawing.savefig(path, format="png", dpi=110, metadata={"Software": None})


def svg(drawing: Any) -> str:
    """A finished matplotlib figure as inline SVG."""
    from matplotlib import pyplot

    drawing.tight_layout()
    out = io.StringIO()
    drawing.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(drawing)
    return f"<figure>{out.getvalue()[out.getvalue().index('<svg') :]}</figure>"
