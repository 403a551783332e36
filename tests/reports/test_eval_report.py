"""The report and the last screen: what they show, and that text is escaped."""

import json
import re
from pathlib import Path
from typing import Any

from chatglm_ja.reports import eval_report, eval_tables, model_card
from tests.reports.pages import cells, table_rows


def test_benchmarks_alone_have_tables(results: dict[str, Any], tmp_path: Path) -> None:
    scored = {"task": "jnli", "metric": "exact_match", "questions": 9, "shots": 4}
    stage = {"name": "sft", "harness": [], "tasks": [scored | {"value": 0.25, "stderr": None}]}
    eval_report.write_benchmarks(tmp_path, [stage])
    text = eval_report.summarize_benchmarks(tmp_path)
    assert text.startswith("### llm-jp-eval\n\n| task |")
    assert ["jnli", "exact_match", "9", "4", "0.250"] in cells(text)
    assert "harness" not in text
    assert text.endswith(f"\n\nresults: {tmp_path}")
    assert json.loads((tmp_path / "results.json").read_text()) == {"stages": [stage]}
    # The answers for a judge are files of their own.
    eval_report.write_benchmarks(tmp_path, [stage | {"tasks": []}])
    assert eval_report.summarize_benchmarks(tmp_path) == f"results: {tmp_path}"


def test_the_page_escapes_text_and_loads_nothing(results: dict[str, Any]) -> None:
    page = eval_report.render_html(results)
    assert "<script" not in page and "<step6>" not in page
    # Two questions, each with its expected or no answer and with two stages' greedy ones; a sample;
    # a setting.
    assert page.count("&lt;script&gt;") == (2 + 1 + 2 * 2) + 1 + 1
    assert "<svg" in page
    assert not re.search(r'(?:src|href)="https?:', page.replace('xlink:href="#', ""))
    assert "Before: 2 tokens" in page
    assert '<span class="new">&lt;b</span>' in page
    assert "Before and after: 1 tokens" in page
    assert "cd" * 32 in page
    assert "ab" * 32 in page


def test_the_page_opens_with_the_verdict(results: dict[str, Any]) -> None:
    results["stages"][-1]["held_out"][0]["way"] = "sampled"
    page = eval_report.render_html(results)
    places = [
        page.index(text)
        for text in (
            "demo/&lt;step6&gt;, of 2030-01-02",
            "<h1>Better in Japanese; 2 of 3 measures outside their limits</h1>",
            '<li class="good">bits/char 4.000 → 3.000 (-25.0%)</li>',
            '<li class="bad">answers in the language 75% (limit 90%)</li>',
            "<figure><svg",
            '<a href="#answers">',
            'id="answers"',
            "<details><summary>Bits per byte</summary>",
        )
    ]
    assert places == sorted(places)
    links = re.findall(r'href="#([a-z]+[-0-9]*)"', page)
    assert len(links) > 5
    assert all(page.count(f'id="{link}"') == 1 for link in links)


def test_answers_stand_side_by_side(results: dict[str, Any]) -> None:
    page = eval_report.render_html(results)
    first, *_ = re.findall(r'<div class="answers">(.*?)\n</div>\n', page, flags=re.DOTALL)
    assert re.findall("<strong>(.*?)</strong>", first) == ["expected", "base", "pretrained"]
    assert first.index("cut <small>…") < first.index("greedy") < first.index("<small>■</small>")
    assert "1 questions of --prompts" in page  # folded
    for stage in results["stages"]:
        stage["answers"] = stage["answers"][1:]
    assert "expected</strong>" not in eval_report.render_html(results)


def test_a_page_has_every_table_and_the_curves(results: dict[str, Any]) -> None:
    page = eval_report.render_html(results)
    assert "bits per character: ja 3.750 -&gt; 3.000 (-20.0%)" in page
    rows = table_rows(page)
    sections = eval_tables.measured_sections(results)
    assert len(sections) > 5
    for *_, (head, body) in sections:
        assert head in rows and body and all(row in rows for row in body)
    _, bits, losses = re.findall("<figure><svg.*?</svg></figure>", page, flags=re.DOTALL)
    # Matplotlib writes a text beside its shape.
    for curve, unit in ((bits, "bits per character"), (losses, "nats per token")):
        for text in ("Step 5", "validation ja", "optimizer steps", unit):
            assert f"<!-- {text} -->" in curve
        assert "#0072b2" in curve  # Japanese, in every picture
        assert re.findall('<g id="line2d_[0-9]+">\\s*<path d="M [^"]*L [^"]*"', curve)
    assert "<!-- training -->" in losses and "<!-- training -->" not in bits


def test_the_last_screen_is_a_table_and_the_verdict(results: dict[str, Any]) -> None:
    for stage, bits, tokens in zip(results["stages"], (2.0, 2.02, 2.25), (0.5, 0.25, 0.25),
                                   strict=True):  # fmt: skip
        stage["languages"]["ja"]["tokens_per_char"] = tokens
        stage["languages"]["zh"] = stage["languages"]["ja"] | {"bits_per_char": bits}
    lines = eval_report.summarize(results, Path("there/report.html")).split("\n")
    assert cells("\n".join(lines[:5])) == [
        ["stage", "ja bits/char", "zh bits/char"],
        ["-" * 10, "-" * 13 + ":", "-" * 13 + ":"],
        ["base", "4.000", "2.000"],
        ["resized", "3.750 (-6.2%)", "2.020 (+1.0%)"],
        ["pretrained", "3.000 (-25.0%)", "2.250 (+12.5%)"],
    ]
    assert lines[5:] == [
        "",
        "Better in Japanese; 1 of 4 measures outside their limits",
        "  Japanese  gained  bits/char 4.000 -> 3.000 (-25.0%), tokens/char 0.500 -> 0.250",
        "  Chinese   gained  tokens/char 0.500 -> 0.250",
        "            missed  bits/char 2.000 -> 2.250 (+12.5%; limit +5%)",
        "Ship it only to users who can live with what it misses: Chinese (1).",
        "report: there/report.html",
    ]
    assert all(len(line) <= 100 for line in lines)


def test_a_run_without_pretraining_is_described_as_it_was(results: dict[str, Any]) -> None:
    results["stages"][2]["name"] = "sft"
    assert "without continued pretraining" in eval_report.describe_pretraining(results)
    card = model_card.render_card(results, Path("nowhere"))
    assert "its pretraining was continued" not in card and "was fine-tuned on instructions" in card
    results["stages"][2]["name"] = "pretrained"
    card = model_card.render_card(results, Path("nowhere"))
    assert "its pretraining was continued" in card and "was fine-tuned" not in card
