"""The report: figures as measured, text escaped, nothing loaded from elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from chatglm_ja.reports import eval_report, model_card
from tests.reports.pages import table_rows

EVIL = "<script>alert(1)</script> & more"


def compared(
    mean: float, error: float | None = 0.25, change: float | None = None, p: float | None = None
) -> dict[str, Any]:
    """What paired.Baseline.compare returns, of four items."""
    return {"items": 4, "mean": mean, "error": error, "change": change, "change_error": 0.1, "p": p}


@pytest.fixture
def results() -> dict[str, Any]:
    def measured(share: float | None) -> dict[str, Any]:
        return {
            "questions": 8, "in_language": share, "ended": 0.5, "repeated": 0.25, "longest_loop": 9,
        }  # fmt: skip

    def stage(name: str, bits: float) -> dict[str, Any]:
        given = {"text": EVIL, "tokens": 3, "stopped": True}
        score = {
            "bits_per_char": bits, "bits_per_byte": bits / 2,
            "tokens_per_char": 0.5, "chars_per_second": 1234.5,
        }  # fmt: skip
        return {
            "name": name,
            "languages": {"ja": score},
            "kept": {},
            "answers": [
                {"language": "ja", "question": EVIL, "greedy": given,
                 "sampled": given | {"text": "cut", "stopped": False}},
            ],
            "answering": {"greedy": measured(1.0), "sampled": measured(None)},
            "held_out": [],
            "choices": {},
            "tasks": [],
            "likeness": [],
            "retention": {},
            "confusion": {},
            "probes": [],
            "translations": [],
            "harness": [],
        }  # fmt: skip

    stages = [stage("base", 4.0), stage("resized", 3.75), stage("pretrained", 3.0)]
    same = {"tokens": 99, "largest_difference": 0.0, "divergence_bits": 0.0}
    stages[1]["kept"] = {"zh": same}
    stages[2]["kept"] = {"zh": same | {"largest_difference": 1.5, "divergence_bits": 0.25}}
    stages[2]["held_out"] = [
        {"kind": "ja", "way": "greedy", **measured(0.75)},
        {"kind": "code", "way": "greedy", **measured(None)},
    ]
    row = {
        "lines": 10,
        "identical_share": 0.5,
        "tokens_per_char_before": 1.0,
        "tokens_per_char_after": 0.5,
    }
    history = [{"step": 0, "eval_ja_loss": 5.0}, {"step": 5, "loss": 4.0}, {"step": 9, "loss": 3.0}]
    manifest = {
        "step": "step6_train_sft",
        "arguments": {"lora_rank": 8, "odd": EVIL},
        "counts": {"steps": 7, "speed": {"mfu": 0.25}},
        "fingerprint": "cd" * 32,
        "lineage": {"step2": "ab" * 32},
        "versions": {"torch": "2"},
    }
    base = {
        "name": "ChatGLM3", "model_class": "GlmForCausalLM", "prefix": "[gMASK] sop",
        "sampling": "temperature 0.8", "license_file": "MODEL_LICENSE",
        "license_name": "chatglm3-6b", "license_note": "Known to its publisher.",
    }  # fmt: skip
    return {
        "base": base,
        "stages": stages,
        "segmentation": {"ja": row},
        "samples": [
            {"language": "ja", "text": EVIL, "before": ["<", "b"], "after": ["<b"], "new": [True]},
            {"language": "en", "text": "a", "before": ["a"], "after": ["a"], "new": [False]},
        ],
        "curves": {"Step 5": history},
        "steps": {"step6_train_sft": manifest},
    }


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")]


def test_changes_are_against_the_base(results: dict[str, Any]) -> None:
    text = eval_report.render_markdown(results)
    assert "3.000 (-25.0%)" in text
    assert "1.500 (-25.0%)" in text  # per byte
    assert "bits per character: ja 3.750 -> 3.000 (-20.0%)" in text
    assert "50.00%" in text
    lines = cells(text)
    assert ["base", "0.500", "1,234"] in lines
    assert ["resized", "zh", "99", "identical", "0.000"] in lines
    assert ["pretrained", "zh", "99", "1.5", "0.250"] in lines
    assert ["resized", "greedy", "8", "100%", "50%", "25%", "9"] in lines
    assert ["ja", "greedy", "8", "75%", "50%", "25%", "9"] in lines
    assert ["code", "greedy", "8", "", "50%", "25%", "9"] in lines


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
    lines = cells(eval_report.render_markdown(results))
    assert ["jnli", "exact_match", "9", "4", *["0.250 ± 0.125"] * 3] in lines
    shares = ["50 ± 25", "38 ± 25 (≈)", "25 ± 25 (-25)"]
    assert ["ja", "25%", "gains most by the question", "4", *shares] in lines
    assert ["t", "acc", *["0.500 ± 0.010"] * 3] in lines
    assert ["t", "bleu", *["12.000"] * 3] in lines
    results["stages"][-1]["held_out"] = []
    assert "held-out questions" not in eval_report.render_html(results)


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


def test_measures_on_items_stand_beside_the_base(results: dict[str, Any]) -> None:
    for stage, change, p in zip(
        results["stages"], (None, 0.1, 0.25), (None, 0.2, 0.001), strict=True
    ):
        row = compared(0.5 + (change or 0), change=change, p=p)
        empty = {**compared(0, None), "items": 0, "mean": None}
        stage["probes"] = [{"language": "ja", "probe": "copy", "chance": 0.25, **row}]
        stage["translations"] = [{"direction": "Chinese > Japanese", "shots": 4, **row}]
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
    lines = cells(eval_report.render_markdown(results))
    shares = ["50 ± 25", "60 ± 25 (≈)", "75 ± 25 (+25)"]
    numbers = ["0.5 ± 0.2", "0.6 ± 0.2 (≈)", "0.8 ± 0.2 (+0.2)"]
    assert ["ja", "copy", "25%", "4", *shares] in lines
    assert ["Chinese > Japanese", "4", "4", *numbers] in lines
    assert ["code", "4", *numbers] in lines
    bits = ["0.50 ± 0.25", "0.60 ± 0.25 (≈)", "0.75 ± 0.25 (+0.25)"]
    assert ["zh", "bits/char of the base's answers", "4", *bits] in lines
    assert ["zh", "ended by itself", "4", *shares] in lines
    assert [line[1] for line in lines if line[:1] == ["ko"]] == [
        "bits/char of the base's answers", "ended by itself", "characters",
    ]  # fmt: skip
    assert ["ja", "no foreign word", "0", "", "", ""] in lines
    assert ["zh", "no foreign word", "4", *shares] in lines
    assert ["ja", "Han outside JIS X 0208", "4", *shares] in lines
    assert ["设", "a b", "x" * 119 + "…"] in lines


def test_the_page_escapes_text_and_loads_nothing(results: dict[str, Any]) -> None:
    page = eval_report.render_html(results)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3 + 1 + 1 + 1  # answers, question, sample, settings
    assert "<svg" in page
    assert not re.search(r'(?:src|href)="https?:', page.replace('xlink:href="#', ""))
    assert "sampled …" in page
    assert "greedy ■" in page
    assert "Before: 2 tokens" in page
    assert '<span class="new">&lt;b</span>' in page
    assert "Before and after: 1 tokens" in page
    assert "cd" * 32 in page
    assert "ab" * 32 in page


def test_a_page_has_every_table_and_both_losses(results: dict[str, Any]) -> None:
    page = eval_report.render_html(results)
    assert "bits per character: ja 3.750 -&gt; 3.000 (-20.0%)" in page
    rows = table_rows(page)
    for _, _, make_table in eval_report.SECTIONS[:7]:
        head, body = make_table(results)
        assert head in rows and body and all(row in rows for row in body)
    (curve,) = re.findall("<figure><svg.*?</svg></figure>", page, flags=re.DOTALL)
    # Matplotlib writes a text beside its shape.
    for text in ("Step 5", "training", "validation ja", "optimizer steps", "nats per token"):
        assert f"<!-- {text} -->" in curve
    assert len(re.findall('<g id="line2d_[0-9]+">\\s*<path d="M [^"]*L [^"]*"', curve)) > 1


def test_the_last_screen_is_a_table_and_three_lines(results: dict[str, Any]) -> None:
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
        "gained: Japanese 4.000 -> 3.000 bits/char (-25.0%), 0.25 instead of 0.50 tokens/char",
        "cost: Chinese +12.5% bits/char; sampled answers: 50% end by themselves",
        "report: there/report.html",
    ]
    # Held-out questions, when there are any, each counted once.
    results["stages"][-1]["held_out"] = [
        {"kind": "ja", "way": "sampled", "questions": 30, "in_language": 1.0, "ended": 1.0},
        {"kind": "zh", "way": "sampled", "questions": 10, "in_language": 0.6, "ended": 0.0},
        {"kind": "zh", "way": "greedy", "questions": 10, "in_language": 0.0, "ended": 0.0},
        {"kind": "code", "way": "sampled", "questions": 10, "in_language": None, "ended": 1.0},
    ]
    assert "sampled answers: 90% in the question's language, 80% end by themselves" in (
        eval_report.summarize(results, Path())
    )
    for stage in results["stages"]:
        del stage["languages"]["zh"]
    assert "cost: no language has more bits/char;" in eval_report.summarize(results, Path())
    results["stages"][-1]["languages"]["ja"]["bits_per_char"] = 4.0
    text = eval_report.summarize(results, Path())
    assert "gained: no language has fewer bits/char\ncost: Japanese +0.0% bits/char;" in text


def test_the_card_has_results_settings_and_the_license(
    results: dict[str, Any], tmp_path: Path
) -> None:
    text = model_card.render_card(results, tmp_path)
    assert text.index("## Use") < text.index("## Results")
    assert eval_report.render_markdown(results).rstrip() in text
    assert ["`lora_rank`", "8"] in cells(text)
    assert ["`steps`", "7"] in cells(text) and ["`mfu`", "0.25"] in cells(text)
    assert "`speed`" not in text
    assert "inherit its license" in text and "publisher. The data" in text
    (tmp_path / "MODEL_LICENSE").write_text("terms")
    assert "(LICENSE in this folder). Known" in model_card.render_card(results, tmp_path)


def hub_metadata(results: dict[str, Any], base: Path) -> dict[str, Any]:
    """What huggingface_hub reads in the card, without its leniency towards what it cannot."""
    card = ModelCard(model_card.render_card(results, base), ignore_metadata_errors=False)
    found: dict[str, Any] = card.data.to_dict()
    return found


def test_the_card_describes_the_model_to_the_hub(results: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    plain = {
        "language": ["ja"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "license": "other",
    }  # fmt: skip
    assert hub_metadata(results, tmp_path) == plain
    for name in (None, "", "chatglm3-6b", "/models/THUDM/chatglm3-6b", "./chatglm3-6b"):
        config.write_text(json.dumps({"_name_or_path": name}))
        assert hub_metadata(results, tmp_path) == plain
    # A step records paths of data sets of the hub only.
    hub = [{"language": "ja", "name": "a", "path": f"owner/{name}"} for name in ("wiki", "talk")]
    results["steps"]["step4_prepare_data"] = {
        "arguments": {"sources": [hub[0], {"name": "local"}], "sft_sources": [hub[1], hub[0]]},
        "counts": {},
    }
    config.write_text(json.dumps({"_name_or_path": "THUDM/chatglm3-6b"}))
    plain |= {
        "base_model": "THUDM/chatglm3-6b", "datasets": ["owner/wiki", "owner/talk"],
        "license_name": "chatglm3-6b",
        "license_link": "https://huggingface.co/THUDM/chatglm3-6b/blob/main/MODEL_LICENSE",
    }  # fmt: skip
    assert hub_metadata(results, tmp_path) == plain
    (tmp_path / "MODEL_LICENSE").write_text("terms")
    assert hub_metadata(results, tmp_path) == plain | {"license_link": "LICENSE"}
    # In YAML 1.1 a bare `no`, Norwegian, is false.
    for stage in results["stages"]:
        stage["languages"] = {"no": stage["languages"]["ja"]}
    assert hub_metadata(results, tmp_path)["language"] == ["no"]


def test_the_card_lists_the_data(results: dict[str, Any], tmp_path: Path) -> None:
    sources = [{"name": "ja/<wiki> & 'more'", "documents": 1234, "train_documents": 1000,
                "train_tokens": 56789, "repeats": 1.5}]  # fmt: skip
    counts = {"pretrain": {"sources": sources}, "sft": {"sources": []}}
    results["steps"]["step4_prepare_data"] = {"counts": counts}
    text = model_card.render_card(results, tmp_path)
    assert ["ja/<wiki> & 'more'", "1,234", "1,000", "56,789", "1.5"] in cells(text)
    assert "Instructions, by source" not in text


def test_the_card_is_put_beside_the_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, step7, model = (tmp_path / name for name in ("base", "step7", "model"))
    for folder in (base, step7, model):
        folder.mkdir()
    (step7 / "model_card.md").write_text("card")
    (step7 / "results.json").write_text(json.dumps({"base": {"license_file": "MODEL_LICENSE"}}))
    (base / "MODEL_LICENSE").write_text("terms")
    (model / "README.md").write_text("old")
    model_card.publish_card(step7, model, base)
    found = {path.name: path.read_text() for path in model.iterdir()}
    assert found == {"README.md": "card", "LICENSE": "terms"}
    model_card.publish_card(step7, tmp_path / "nowhere", base)
    assert "could not write the model card to" in caplog.text


def test_a_run_without_pretraining_is_described_as_it_was(results: dict[str, Any]) -> None:
    results["stages"][2]["name"] = "sft"
    assert "without continued pretraining" in eval_report.describe_pretraining(results)
    card = model_card.render_card(results, Path("nowhere"))
    assert "its pretraining was continued" not in card and "was fine-tuned on instructions" in card
    results["stages"][2]["name"] = "pretrained"
    card = model_card.render_card(results, Path("nowhere"))
    assert "its pretraining was continued" in card and "was fine-tuned" not in card
