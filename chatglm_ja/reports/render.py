"""Rendering of the templates in templates/: HTML pages (*.html.jinja) and Markdown (*.md.jinja).

Python prepares rows and numbers, a template formats them. Everything is escaped in HTML, nothing in
Markdown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from chatglm_ja.plots import name_language

Table = tuple[list[str], list[list[str]]]  # head and rows

TEMPLATES = Path(__file__).parent / "templates"


def render_template(name: str, **values: Any) -> str:
    """Return the text of a template; a value that the template needs and lacks is an error."""
    return _environment.get_template(name).render(values)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that also reads well in a terminal.

    The first column is aligned left, the others right.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (head, rule, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *cells]) + " |")
    return "\n".join(lines)


_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=lambda name: name is None or not name.endswith(".md.jinja"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.globals |= {"markdown_table": markdown_table, "name_language": name_language}
