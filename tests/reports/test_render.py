"""Templates: what is escaped, and what is an error."""

import jinja2
import pytest

from chatglm_ja.reports.render import TEMPLATES, markdown_table, render_template


def test_every_template_compiles_and_misses_its_values() -> None:
    pages = [path.name for path in TEMPLATES.glob("*report*")] + ["results.md.jinja"]
    assert len(pages) == 4
    for name in pages:
        with pytest.raises(jinja2.UndefinedError):
            render_template(name)


def test_markdown_is_not_escaped() -> None:
    sections = [("a < b", "it's", ["head", "number"], [["<x>", "1"], ["long text", "2,000"]])]
    text = render_template("results.md.jinja", pretraining="-> & more", sections=sections)
    assert "-> & more" in text and "### a < b\n\nit's\n\n| head" in text
    assert markdown_table(*sections[0][2:]) in text


def test_markdown_tables_are_aligned() -> None:
    assert markdown_table(["head", "number"], [["x", "1"], ["longer", "2,000,000"]]) == (
        "| head   |    number |\n"
        "| ------ | --------: |\n"
        "| x      |         1 |\n"
        "| longer | 2,000,000 |"
    )
