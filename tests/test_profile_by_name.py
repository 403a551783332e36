"""The data sets of the profile chatglm3-6b, loaded by name: stand-ins that a mirror serves.

They have the names, files, formats and columns of the originals, and the demo's texts.
"""

import gzip
import json
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from chatglm_ja.sources import Source
from tests.conftest import demo_texts
from tests.data.hub_server import serving
from tests.pipeline import PROJECT, Runner

PARQUET = "data/train-00000-of-00001-157934b4864eb8e0.parquet"
# The files of the originals; those of wikitext are in a folder for each configuration.
FILES = {
    "izumi-lab/wikipedia-ja-20230720": PARQUET,
    "globis-university/aozorabunko-clean": "aozorabunko-dedupe-clean.jsonl.gz",
    "pleisto/wikipedia-cn-20230720-filtered": "wikipedia-cn-20230720-filtered.json",
    "Salesforce/wikitext": "wikitext-103-raw-v1/train-00000-of-00001.parquet",
    "kunishou/oasst2-chat-68k-ja": "oasst2_chat_ja.jsonl",
    "kunishou/databricks-dolly-15k-ja": "databricks-dolly-15k-ja.json",
    "fn-aka-mur/japanese_hh-rlhf-49k": PARQUET,
    "shibing624/alpaca-zh": PARQUET,
    "LooksJuicy/ruozhiba": "ruozhiba_qa.json",
    "microsoft/wiki_qa": "data/train-00000-of-00001.parquet",
    "databricks/databricks-dolly-15k": "databricks-dolly-15k.jsonl",
    "HuggingFaceH4/no_robots": "data/train-00000-of-00001.parquet",
    "sahil2801/CodeAlpaca-20k": "code_alpaca_20k.json",
    "iamtarun/python_code_instructions_18k_alpaca": PARQUET,
}
WIKITEXT_CARD = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files: [{split: train, path: wikitext-103-raw-v1/train-*}]
- config_name: wikitext-2-raw-v1
  data_files: [{split: train, path: wikitext-2-raw-v1/train-*}]
---
"""


def text_records(source: Source, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(texts):
        if source.format == "wikitext":
            lines = ["", f" = Article {number} = \n", *(f" {line} \n" for line in text.split("\n"))]
            yield from ({"text": line} for line in lines)
        else:
            yield {"id": str(number), source.columns or "text": text}


def conversation_records(source: Source, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(texts):
        question, answer = f"{source.name} {number}: {text[:20]}", text[:120]
        match source.columns:
            case "conversations":
                turns = {"human": question, "gpt": answer}
                yield {"conversations": [{"from": k, "value": v} for k, v in turns.items()]}
            case "messages":
                turns = {"user": question, "assistant": answer}
                yield {"messages": [{"role": k, "content": v} for k, v in turns.items()]}
            case str(columns):
                questions, answers = columns.split(">")
                asked, *context = questions.split("+")
                # One in three of wiki_qa's answers is right here.
                yield {asked: question, **dict.fromkeys(context, ""), answers: answer,
                       "label": int(number % 3 == 0)}  # fmt: skip


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        packed = gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode()
        path.write_bytes(packed)


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names in constants.py under the profile."""
    monkeypatch.setenv("CHATGLM_JA_PROFILE", "chatglm3-6b")
    return runpy.run_path(str(PROJECT / "constants.py"))


@pytest.fixture
def hub(profile: dict[str, Any], tmp_path: Path) -> Path:
    texts = {name: demo_texts(name, 400) for name in ("ja", "zh", "en")}
    texts["code"] = [f"print({number})  # {text[:60]}" for number, text in enumerate(texts["en"])]
    root = tmp_path / "hub"
    sources = [*profile["PRETRAIN_SOURCES"], *profile["SFT_SOURCES"]]
    assert {source.path for source in sources if not source.is_local()} == FILES.keys()
    for number, source in enumerate(sources):
        # No two have a text in common, or all but one would lose it.
        own = texts[source.language][number % 4 :: 4]
        make = text_records if source in profile["PRETRAIN_SOURCES"] else conversation_records
        write(root / source.path / FILES[source.path], list(make(source, own)))
    (root / "Salesforce/wikitext/README.md").write_text(WIKITEXT_CARD)
    return root


def test_steps_1_2_and_4_read_the_profiles_data_sets(
    hub: Path, base_dir: Path, tmp_path: Path
) -> None:
    runner = Runner(tmp_path)
    data = "--num-processes 1 --total-tokens 40000 --validation-tokens 1000 --sft-examples 120 "
    data += "--sft-validation-examples 10 --block-size 128 --max-length 256"
    with serving(hub) as endpoint:
        runner.environment |= {
            "CHATGLM_JA_PROFILE": "chatglm3-6b", "CHATGLM3_6B_DIR": str(base_dir),
            "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"),
        }  # fmt: skip
        said = ""
        for step, flags in (
            ("step1_train_tokenizer.py", "--vocab-size 1500"),
            ("step2_merge_tokenizer.py", ""),
            ("step4_prepare_data.py", data),
        ):
            result = runner.run(step, *flags.split())
            assert result.returncode == 0, result.stderr
            said += result.stderr
    results = tmp_path / "chatglm3-6b/step4_data/manifest.json"
    counts = json.loads(results.read_text())["counts"]
    found = [*counts["pretrain"]["sources"], *counts["sft"]["sources"]]
    assert len(found) == len(FILES)
    assert all(source["kept"] > 5 for source in found), found
    assert said.count("downloading") == len(FILES)  # each once
    assert "HTTP" not in said
