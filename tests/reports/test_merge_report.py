"""Step 2's page: the verdict, all pieces, and the lines whose segmentation changed."""

import html
import re
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.reports import merge_report
from tests.reports.pages import PHONE, loads_nothing, open_in_browser, shown_pieces, table_rows


def make_row(before: float, after: float, identical: int, **others: Any) -> dict[str, Any]:
    return {
        "lines": 1000, "identical_lines": identical, "identical_share": identical / 1000,
        "covered_lines": 200, "tokens_per_char_before": before, "tokens_per_char_after": after,
        "new_token_share": 0.0, "used_share": 0.0, "rust_differs": 0, "changed": [], **others,
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    line = {"line": "<b>線", "before": ["▁<b>", "線"], "after": ["▁<b>線"], "new": [True]}
    return {
        "policy": "japanese",
        "guarantee": "No <i>Chinese</i> line changes.",
        "counts": {"base_pieces": 3000, "added": 3, "vocabulary": 3012},
        "first_new_id": 3009,
        "added": ["です", "</pre><script>", "ます"],
        "dropped": {"already_known": [], "unreachable": [f"<{i}>" for i in range(1234)]},
        "languages": {
            "ja": make_row(
                0.919, 0.468, 250, used_share=0.5, new_token_share=0.125, changed=[line]
            ),
            "zh": make_row(0.5, 0.5, 1000),
            "en": make_row(0.3, 0.3, 1000),
        },
    }


def shown_lists(page: str) -> list[tuple[str, list[str]]]:
    """Return the head and the lines of every list of pieces."""
    found = re.findall(r"<summary><b>(.*?)<output>.*?>\n(.*?)</div>", page, flags=re.DOTALL)
    lists = []
    for head, parts in found:
        lines = "\n".join(re.findall("<pre>(.*?)</pre>", parts, flags=re.DOTALL)).split("\n")
        lists.append((html.unescape(head.replace("</b>", "")), list(map(html.unescape, lines))))
    return lists


def test_the_page_opens_with_what_was_gained_and_what_it_cost(report: dict[str, Any]) -> None:
    page = merge_report.render_html(report, "Chat<GLM>3")
    assert "<h1>New pieces in Chat&lt;GLM&gt;3" in page
    assert (
        "3 new pieces: Japanese needs 0.468 instead of 0.919 tokens per character; no Chinese or "
        "English line changed." in page
    )
    assert '<li class="good">0.919 → 0.468 tokens per character: 49% fewer</li>' in page
    assert '<li class="quiet">750 of 1,000 held-out lines are segmented anew.</li>' in page
    assert page.count('<li class="good">All 1,000 held-out lines are segmented as before.') == 2
    assert page.count("<figure><svg") == 1


def test_lines_that_change_for_little_are_a_cost(report: dict[str, Any]) -> None:
    report["languages"]["zh"] = make_row(0.5, 0.48, 793)
    assert merge_report.describe_verdict(report).endswith(
        "per character; 207 of 1,000 Chinese lines changed, no English line changed."
    )
    page = merge_report.render_html(report, "ChatGLM3")
    assert '<li class="bad">207 of 1,000 held-out lines are segmented otherwise' in page
    report["languages"]["zh"] = make_row(0.5, 0.5, 999)  # a line that quotes Japanese
    page = merge_report.render_html(report, "ChatGLM3")
    assert '<li class="good">999 of 1,000 held-out lines are segmented as before.' in page
    assert 'class="bad"' not in page and "; 1 of 1,000 Chinese lines changed" in page


def test_the_page_lists_all_pieces_with_their_ids(report: dict[str, Any]) -> None:
    page = merge_report.render_html(report, "ChatGLM3")
    assert "3 new pieces added to 3,000 base pieces and 9 special tokens: 3,012 ids" in page
    assert shown_lists(page) == [
        ("3 added, each after its id", ["3009 です", "3010 </pre><script>", "3011 ます"]),
        (
            "1,234 unreachable (the base's own merges always come first)",
            [f"<{i}>" for i in range(1234)],
        ),
    ]
    assert page.count("<script>") == 1 and "<i>" not in page and "<b>線" not in page
    assert loads_nothing(page)


def test_the_page_shows_what_changed_without_columns_of_zeros(report: dict[str, Any]) -> None:
    page = merge_report.render_html(report, "ChatGLM3")
    head = ["lines", "as before", "guaranteed", "before", "after", "pieces used", "new tokens"]
    assert table_rows(page) == [
        ["language", *head],
        ["ja", "1,000", "250", "200", "0.919", "0.468", "50.0%", "12.5%"],
        ["zh", "1,000", "1,000", "200", "0.500", "0.500", "0.0%", "0.0%"],
        ["en", "1,000", "1,000", "200", "0.300", "0.300", "0.0%", "0.0%"],
    ]
    for title in set(head) - {"lines"}:
        assert f"<li><b>{title}</b>: " in page
    assert shown_pieces(page) == [["▁<b>", "線"], ["▁<b>線"]]
    assert '<span class="new">▁&lt;b&gt;線</span>' in page and "2 → 1 tokens" in page
    assert "first ja lines" in page and "first zh lines" not in page
    report["languages"]["zh"]["rust_differs"] = 3
    assert ["language", *head, "files differ"] in table_rows(
        merge_report.render_html(report, "ChatGLM3")
    )


def test_the_policy_all_adds_what_it_lists(report: dict[str, Any]) -> None:
    page = merge_report.render_html(report | {"policy": "all"}, "ChatGLM3")
    assert "always come first), but added under this policy" in page


@pytest.mark.parametrize(
    ("content", "spelled"),
    [
        ("▁です", "▁です"),
        (" です".encode(), "▁です"),
        ("のー".encode()[:-1], r"の\xe3\x83"),
        ("a\n\u3000\u202eb", r"a\n\u3000\u202eb"),
    ],
)
def test_a_piece_is_one_line_that_can_be_read(content: str | bytes, spelled: str) -> None:
    assert merge_report.spell_piece(content) == spelled


def test_the_search_filters_every_list(report: dict[str, Any], tmp_path: Path) -> None:
    report["added"] = [f"です{i}" for i in range(20_000)]
    merge_report.write_report(tmp_path, report, "ChatGLM3")
    with open_in_browser(tmp_path / "merge_report.html", PHONE) as page:
        search, found = page.get_by_role("searchbox"), page.locator("output")

        def shown() -> list[list[str]]:
            lists = page.locator(".list")
            return [lists.nth(i).locator("pre").all_text_contents() for i in range(2)]

        whole = shown()
        assert [len("\n".join(parts).split("\n")) for parts in whole] == [20_000, 1234]
        assert page.evaluate("window.find('です19999')")  # as Ctrl-F does
        search.fill(" です1999 ")
        assert shown()[0][0].split("\n")[:2] == ["5008 です1999", "22999 です19990"]
        assert found.all_text_contents() == [": 11 found", ": 0 found"]
        search.fill("<12>")
        assert shown() == [[], ["<12>"]]
        search.fill("")
        assert shown() == whole
        assert found.all_text_contents() == ["", ""]
