"""What a test writes into a report, and what it reads from one, as text or in a browser."""

import contextlib
import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# The browser runs as root.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
PHONE = 390  # the width of a window in pixels
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


def loads_nothing(page: str) -> bool:
    """Return whether a page needs no other file: no source, no style, no picture."""
    return not re.search(r"<(link|img|iframe)|\bsrc=|@import|url\((?!#)", page)


@contextlib.contextmanager
def open_in_browser(path: Path, width: int) -> Iterator[Any]:
    """Yield a page in headless Chromium; skip the test without one.

    The page must be as wide as the window, raise no error and request no file but itself.
    """
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs requirements-extras.txt")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": width, "height": 800})
        seen: list[str] = []
        page.on("request", lambda request: seen.append(request.url))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.goto(path.as_uri())
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert seen == [path.as_uri()]
        browser.close()
