"""Building blocks of the HTML pages that the steps write, and of tables in Markdown.

A page is one file that loads nothing from anywhere: pictures are inline SVG, all text is escaped.
"""

import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.6 system-ui, "Noto Sans CJK JP", sans-serif; max-width: 64rem; color: #1d2330;
       margin: 0 auto; padding: 1rem; background: #fff; }
h1 { line-height: 1.25; } h2 { margin-top: 2.5rem; }
/* A table that is too wide casts a shadow where it goes on. */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, #fff 40%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, #fff 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, #0004, transparent) left / .6rem 100% no-repeat scroll,
  linear-gradient(to left, #0004, transparent) right / .6rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #d8dce5; }
th { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.pieces span { display: inline-block; padding: 0 .25em; margin: 1px; border-radius: 4px; }
.pieces span:nth-child(odd) { background: #dbe9ff; } .pieces span:nth-child(even) { background: #ffe8c7; }
.pieces .new { background: #c9efcf !important; }
details { margin: .4rem 0; } summary { cursor: pointer; } details td { text-align: left; }
details td { overflow-wrap: anywhere; white-space: normal; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
.wide svg { min-width: 38rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; }
.answers div { background: #f4f6fa; border-radius: 8px; padding: .6rem .8rem; }
.answers p { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere;
             max-height: 12.8em; overflow-y: auto; }  /* eight lines */
.answers strong { display: block; }
.question { font-weight: 600; white-space: pre-wrap; margin: 1.5rem 0 .5rem; }
.example { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6fa; border-radius: 8px;
           padding: .6rem .8rem; } mark { background: #c9efcf; } .special { color: #9a4d00; }
@media (max-width: 40rem) { th, td { padding: .25rem .35rem; font-size: .85rem; }
                           th { white-space: normal; } }
small { color: #5a6375; } code { overflow-wrap: anywhere; }
"""  # noqa: E501


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page of sections that are HTML already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(sections)
        + "</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; its first column is aligned left, the others right."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(head, "th")}{body}</table></div>'


def pieces(tokens: Sequence[str], new: Sequence[bool] = ()) -> str:
    """The tokens of a text, each in a box of its own; those that are new stand out."""
    marks = [' class="new"' if flag else "" for flag in new] or [""] * len(tokens)
    boxes = [
        f"<span{mark}>{html.escape(piece)}</span>"
        for piece, mark in zip(tokens, marks, strict=True)
    ]
    return f'<p class="pieces">{"".join(boxes)}</p>'
