"""The report: figures as measured, text escaped, nothing loaded from elsewhere."""

import re
from typing import Any

import pytest

from chatglm_ja import report

EVIL = "<script>alert(1)</script> & more"


@pytest.fixture
def results() -> dict[str, Any]:
    def stage(name: str, bits: float) -> dict[str, Any]:
        given = {"language": "ja", "question": EVIL, "text": EVIL, "tokens": 3, "stopped": True}
        score = {"bits_per_char": bits, "tokens_per_char": 0.5}
        return {"name": name, "languages": {"ja": score}, "answers": [given]}

    row = {
        "lines": 10,
        "identical_share": 0.5,
        "tokens_per_char_before": 1.0,
        "tokens_per_char_after": 0.5,
    }
    history = [{"step": 0, "eval_ja_loss": 5.0}, {"step": 5, "loss": 4.0}, {"step": 9, "loss": 3.0}]
    return {
        "stages": [stage("base", 4.0), stage("resized", 3.75), stage("pretrained", 3.0)],
        "held_out_answers": [
            {"kind": "ja", "way": "greedy", "questions": 8, "in_language": 0.75, "ended": 1.0},
            {"kind": "code", "way": "greedy", "questions": 8, "in_language": None, "ended": 0.5},
        ],
        "segmentation": {"ja": row},
        "sample": {"text": EVIL, "before": ["<", "b"], "after": ["<b"]},
        "curves": {"Step 5": history},
        "lineage": {"step2": "ab" * 32},
        "versions": {"torch": "2"},
    }


def test_changes_are_against_the_base(results: dict[str, Any]) -> None:
    text = report.markdown(results)
    assert "3.000 (-25.0%)" in text
    assert "ja 3.750 -> 3.000 (-20.0%)" in text
    assert "50.00%" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")]
    assert ["ja", "greedy", "8", "75%", "100%"] in lines
    assert ["code", "greedy", "8", "", "50%"] in lines


def test_the_page_escapes_text_and_loads_nothing(results: dict[str, Any]) -> None:
    page = report.html_page(results)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<svg" in page
    assert not re.search(r'(?:src|href)="https?:', page.replace('xlink:href="#', ""))


def test_without_held_out_questions_their_table_is_left_out(results: dict[str, Any]) -> None:
    results["held_out_answers"] = []
    assert report.HELD_OUT not in report.markdown(results)
    assert report.HELD_OUT not in report.html_page(results)
