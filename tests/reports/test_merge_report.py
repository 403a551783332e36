"""Step 2's page: counts, pieces, languages, and the lines whose segmentation changed."""

from typing import Any

import pytest

from chatglm_ja.reports import merge_report
from tests.reports.pages import shown_pieces, table_rows


@pytest.fixture
def report() -> dict[str, Any]:
    row = {
        "lines": 1000, "identical_lines": 250, "identical_share": 0.25, "covered_lines": 200,
        "tokens_per_char_before": 0.9, "tokens_per_char_after": 0.4, "new_token_share": 0.125,
        "used_share": 0.5, "rust_differs": 3,
        "changed": [{"line": "<b>線", "before": ["▁<b>", "線"], "after": ["▁<b>線"]}],
    }  # fmt: skip
    return {
        "policy": "japanese",
        "guarantee": "No <i>Chinese</i> line changes.",
        "counts": {"base_pieces": 3000, "added": 2241, "vocabulary": 5250},
        "dropped": {"already_known": [], "unreachable": [f"<{i}>" for i in range(1234)]},
        "languages": {"ja": row, "zh": row | {"changed": []}},
    }


def test_the_page_shows_counts_pieces_and_changed_lines(report: dict[str, Any]) -> None:
    page = merge_report.render_html(report, "ChatGLM3")
    assert "2,241 new pieces added to 3,000 base pieces and 9 special tokens: 5,250 ids" in page
    rows = table_rows(page)
    assert rows[:4] == [
        ["learned pieces", "number"],
        ["added", "2,241"],
        ["already in the base", "0"],
        ["unreachable (the base's own merges always come first)", "1,234"],
    ]
    assert ["ja", "1,000", "25.00%", "0.900", "0.400"] in rows
    assert ["zh", "200", "50.0%", "12.5%", "3 lines"] in rows
    assert shown_pieces(page) == [[f"<{i}>" for i in range(20)], ["▁<b>", "線"], ["▁<b>線"]]
    assert "Before: 2 tokens" in page and "After: 1 tokens" in page
    assert "first ja lines" in page and "first zh lines" not in page
    assert page.count("<figure><svg") == 1
    assert "<b>線" not in page and "<i>" not in page


def test_the_policy_all_adds_what_it_lists(report: dict[str, Any]) -> None:
    page = merge_report.render_html(report | {"policy": "all"}, "ChatGLM3")
    assert "always come first), but added under this policy" in page
