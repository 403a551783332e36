"""What a test writes into a report, and what it reads from one."""

import html
import re
from typing import Any

EVIL = "<script>alert(1)</script> & more"


def compared(
    mean: float, error: float | None = 0.25, change: float | None = None, p: float | None = None
) -> dict[str, Any]:
    """What paired.Baseline.compare returns, of four items."""
    return {"items": 4, "mean": mean, "error": error, "change": change, "change_error": 0.1, "p": p}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")]


def table_rows(page: str) -> list[list[str]]:
    """Return the cells of every row of every table, heads included."""
    return [
        [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", page)
    ]


def shown_pieces(page: str) -> list[list[str]]:
    """Return the pieces of every segmented text."""
    return [
        [html.unescape(piece) for piece in re.findall(r"<span[^>]*>(.*?)</span>", text)]
        for text in re.findall(r'<p class="pieces">(.*?)</p>', page, flags=re.DOTALL)
    ]
