"""Step 2 as a program, for both families: a base that goes on without new pieces."""

import importlib
import sys
from pathlib import Path

import pytest

from chatglm_ja.bases import families
from chatglm_ja.storage.files import read_json
from chatglm_ja.storage.manifest import read_manifest
from tests.conftest import DATA, demo_texts
from tests.tiny_models import make_base


@pytest.mark.parametrize("family", ["chatglm3", "transformers"])
def test_a_base_goes_on_without_new_pieces(
    family: str, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_dir
    if family == "transformers":
        base = make_base("qwen3", tmp_path / "base", demo_texts("en", 3))
    output = tmp_path / "step2"
    flags = f"--base-model {base} --ja-tokenizer {tmp_path}/none --max-new-pieces 0"
    sources = [f"ja={DATA}/heldout_ja.jsonl.gz", f"en={DATA}/heldout_en.jsonl.gz"]
    arguments = [*flags.split(), "--check-sources", *sources, "--output-dir", str(output)]
    monkeypatch.setattr(sys, "argv", ["step2", *arguments])
    importlib.import_module("step2_merge_tokenizer").main()

    manifest, report = read_manifest(output), read_json(output / "merge_report.json")
    assert manifest is not None and "step1_train_tokenizer" not in manifest.inputs
    assert manifest.counts["added"] == 0
    assert all(row["identical_share"] == 1 for row in report["languages"].values())
    assert ("Pieces of this vocabulary are bytes" in report["guarantee"]) == (base != base_dir)
    before, after = families.open_base(base).tokenizer, families.load_tokenizer(output)
    assert after.size == after.first_new_id == before.size == manifest.counts["vocabulary"]
    page = (output / "merge_report.html").read_text(encoding="utf-8")
    assert "0 new pieces: no Japanese or English line changed." in page
    assert 'type="search"' not in page  # there is nothing to search
