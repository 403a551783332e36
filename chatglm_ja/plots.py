"""Matplotlib figures whose files are byte-identical from run to run, and the colors of languages.

A language has one color in every picture and on every page.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INK = "#1d2330"  # of text, and of what belongs to no language
# Of Okabe and Ito's palette, which people with color vision deficiencies can tell apart.
_LANGUAGE_COLORS = {"ja": "#0072b2", "zh": "#d55e00", "en": "#009e73"}
_OTHER_COLORS = ("#cc79a7", "#8a6fc0", "#7a6a00", "#56b4e9", "#6b7280")


def language_colors(languages: Iterable[str]) -> dict[str, str]:
    """Return the color of every language, or other kind of data, as #rrggbb.

    The colors of ja, zh and en are fixed; the others take theirs in the order given.
    """
    names = list(dict.fromkeys(languages))
    others = [name for name in names if name not in _LANGUAGE_COLORS]
    colors = {name: _OTHER_COLORS[i % len(_OTHER_COLORS)] for i, name in enumerate(others)}
    return {name: _LANGUAGE_COLORS.get(name) or colors[name] for name in names}


def make_figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """Make a Matplotlib figure, its size in inches, and return it with its axes.

    A page shows an inch as 96 pixels, or less on a narrow screen: a figure of at most 5 inches can
    be read on a phone. `grid` goes to pyplot.subplots (nrows, ncols, ...), which returns several
    axes as an array.
    """
    import matplotlib

    matplotlib.use("svg")
    # Derive the ids inside an SVG from its content, not from random numbers.
    matplotlib.rcParams["svg.hashsalt"] = "chatglm_ja"
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), **grid)


def save_png(figure: Any, path: Path) -> None:
    """Write a figure as PNG, and close it."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def to_svg(figure: Any) -> str:
    """Return a figure as an <svg> element, and close it."""
    from matplotlib import pyplot

    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = out.getvalue()
    return svg[svg.index("<svg") :].rstrip()
