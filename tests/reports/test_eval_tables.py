"""The tables of step 7: figures as measured."""

from typing import Any

from chatglm_ja.reports import eval_report, eval_tables
from tests.reports.pages import compared


def all_rows(results: dict[str, Any]) -> list[list[str]]:
    return [row for *_, (_, rows) in eval_tables.measured_sections(results) for row in rows]


def test_changes_are_against_the_base(results: dict[str, Any]) -> None:
    text = eval_report.render_markdown(results)
    assert "3.000 (-25.0%)" in text
    assert "Bits per byte" not in text  # which the page has, folded
    assert "bits per character: ja 3.750 -> 3.000 (-20.0%)" in text
    assert "50.00%" in text
    lines = all_rows(results)
    assert ["pretrained", "1.500 (-25.0%)"] in lines  # per byte
    assert ["base", "0.500", "1,234"] in lines
    assert ["resized", "zh", "99", "identical", "0.000"] in lines
    assert ["pretrained", "zh", "99", "1.5", "0.250"] in lines
    assert ["resized", "greedy", "8", "100%", "50%", "25%", "9"] in lines
    assert ["ja, pretrained", "greedy", "8", "75%", "50%", "25%", "9"] in lines
    assert ["code, pretrained", "greedy", "8", "", "50%", "25%", "9"] in lines


def test_what_was_scored_is_named(results: dict[str, Any]) -> None:
    scored = {"arguments": {"sources": [{"name": "heldout_ja"}, {"name": "news"}]}}
    results["steps"]["step7_eval"] = results["steps"]["step6_train_sft"] | scored
    assert "Held-out text (heldout_ja, news): lower is better" in eval_report.render_markdown(
        results
    )


def test_what_was_not_measured_has_no_table(results: dict[str, Any]) -> None:
    assert "Multiple choice" not in eval_report.render_markdown(results)
    assert "lm-evaluation-harness" not in eval_report.render_markdown(results)
    assert "llm-jp-eval" not in eval_report.render_markdown(results)
    for place, stage in enumerate(results["stages"]):
        p = (None, 0.5, 0.001)[place]
        row = compared(0.5 - place / 8, change=-place / 8 if place else None, p=p)
        stage["choices"] = {
            "ja": {
                "questions": 4, "chance": 0.25, "acc": 0.5, "acc_norm": 0.5, "acc_gain": 0.5,
                "compared": {"acc": row, "acc_norm": row, "acc_gain": row},
            }
        }  # fmt: skip
        stage["harness"] = [
            {"task": "t", "metric": "acc", "value": 0.5, "stderr": 0.01},
            {"task": "t", "metric": "bleu", "value": 12.0, "stderr": None},
        ]
        scored = {"task": "jnli", "metric": "exact_match", "questions": 9, "shots": 4}
        stage["tasks"] = [scored | {"value": 0.25, "stderr": 0.125}]
    lines = all_rows(results)
    assert ["jnli", "exact_match", "9", "4", *["0.250 ± 0.125"] * 3] in lines
    shares = ["50 ± 25", "38 ± 25 (≈)", "25 ± 25 (-25)"]
    assert ["ja, gains most by the question (25% by chance)", "4", *shares] in lines
    assert ["t", "acc", *["0.500 ± 0.010"] * 3] in lines
    assert ["t", "bleu", *["12.000"] * 3] in lines
    results["stages"][-1]["held_out"] = []
    assert "held-out questions" not in eval_report.render_html(results)


def test_measures_on_items_stand_beside_the_base(results: dict[str, Any]) -> None:
    for stage, change, p in zip(
        results["stages"], (None, 0.1, 0.25), (None, 0.2, 0.001), strict=True
    ):
        row = compared(0.5 + (change or 0), change=change, p=p)
        empty = {**compared(0, None), "items": 0, "mean": None}
        stage["probes"] = [{"language": "ja", "probe": "copy", "chance": 0.25, **row}]
        stage["translations"] = [
            {"language": "ja", "direction": "Chinese > Japanese", "shots": 4, **row}
        ]
        stage["likeness"] = [{"kind": "code", **row}]
        stage["retention"] = {
            "zh": {"bits_per_char": row, "in_language": row, "ended": row, "characters": row},
            "ko": {"bits_per_char": row, "in_language": None, "ended": row, "characters": row},
        }
        example = {"question": "a\nb", "answer": "x" * 200, "characters": "设"}
        stage["confusion"] = {
            "ja": {
                "lines": row, "words": empty, "other_han": row, "han_examples": [example],
            },
            "zh": {"lines": row, "words": row, "other_han": None, "han_examples": []},
        }  # fmt: skip
    lines = all_rows(results)
    shares = ["50 ± 25", "60 ± 25 (≈)", "75 ± 25 (+25)"]
    numbers = ["0.5 ± 0.2", "0.6 ± 0.2 (≈)", "0.8 ± 0.2 (+0.2)"]
    assert ["ja, copy", "25%", "4", *shares] in lines
    assert ["Chinese > Japanese, 4", "4", *numbers] in lines
    assert ["code", "4", *numbers] in lines
    bits = ["0.50 ± 0.25", "0.60 ± 0.25 (≈)", "0.75 ± 0.25 (+0.25)"]
    assert ["zh, bits/char of the base's answers", "4", *bits] in lines
    assert ["zh, ended by itself", "4", *shares] in lines
    assert [line[0] for line in lines if line[0].startswith("ko")] == [
        "ko, bits/char of the base's answers", "ko, ended by itself", "ko, characters",
    ]  # fmt: skip
    assert ["ja, no foreign word", "0", "", "", ""] in lines
    assert ["zh, no foreign word", "4", *shares] in lines
    assert ["ja, Han outside JIS X 0208", "4", *shares] in lines
    assert ["设", "a b", "x" * 119 + "…"] in lines
