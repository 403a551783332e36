"""Templates: what is escaped, and what is an error."""

from typing import Any

import jinja2
import pytest

from chatglm_ja.reports import eval_report
from chatglm_ja.reports.render import TEMPLATES, markdown_table, render_template


def test_every_template_compiles_and_misses_its_values() -> None:
    pages = [path.name for path in TEMPLATES.glob("*report*")] + ["results.md.jinja"]
    assert len(pages) == 4
    for name in pages:
        with pytest.raises(jinja2.UndefinedError):
            render_template(name)


def test_markdown_is_not_escaped(results: dict[str, Any]) -> None:
    results["stages"][-1]["name"] = "it's <x> & more"
    text = eval_report.render_markdown(results)
    assert "\n| it's <x> & more | 3.000 (-25.0%) |\n" in text
    assert "limits. Nothing" in text and "4.000 -> 3.000" in text


def test_markdown_tables_are_aligned() -> None:
    assert markdown_table(["head", "number"], [["x", "1"], ["longer", "2,000,000"]]) == (
        "| head   |    number |\n"
        "| ------ | --------: |\n"
        "| x      |         1 |\n"
        "| longer | 2,000,000 |"
    )
