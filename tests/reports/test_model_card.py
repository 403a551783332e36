"""The model card: results, settings, data, and what a hub reads in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from chatglm_ja.reports import eval_report, model_card
from tests.reports.pages import cells


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
