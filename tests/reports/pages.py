"""What a test reads from an HTML page."""

import html
import re


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
