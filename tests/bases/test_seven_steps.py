"""Tiny bases of other architectures walk steps 1 to 7, all in one process."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm_ja.bases import families
from tests.bases.tiny_tokenizers import make_llama
from tests.conftest import DATA, demo_texts
from tests.tiny_models import TOKENIZERS, make_base, make_tiny

LLAMA_2_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST] {{ message.content }} "
    "[/INST]{% else %} {{ message.content }} </s>{% endif %}{% endfor %}"
)
TEXTS = [f"{language}={DATA}/train_{language}.jsonl.gz" for language in ("ja", "en")]
CHATS = [f"{kind}={DATA}/train_sft.jsonl.gz?kind={kind}" for kind in ("ja", "en")]
HELD_OUT = [f"{language}={DATA}/heldout_{language}.jsonl.gz" for language in ("ja", "zh", "en")]
TRAINING = (
    "--max-steps 2 --evaluations 1 --block-size 512 --lora-rank 4 --lora-alpha 8 --tracker none "
    "--global-batch-size 4"
)


def make_llama_2(folder: Path) -> Path:
    """Save a tiny base with a sentencepiece tokenizer, and a chat template of Llama 2's form."""
    tokenizer = make_llama(folder)
    (folder / "chat_template.jinja").write_text(LLAMA_2_TEMPLATE, encoding="utf-8")
    return make_tiny("llama", folder, len(tokenizer) + 3, max_position_embeddings=2048)


@pytest.mark.parametrize("kind", [*TOKENIZERS, "llama 2"])
def test_a_base_walks_all_steps(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = itertools.chain.from_iterable(text.split("\n") for text in demo_texts("en", 20))
    base = tmp_path / "base"
    if kind == "llama 2":
        make_llama_2(base)
    else:
        make_base(kind, base, lines, max_position_embeddings=2048)
    folders = {number: tmp_path / f"step{number}" for number in range(1, 8)}

    def step(name: str, flags: str, *more: str) -> None:
        number = int(name[4])
        arguments = [name, *flags.split(), *more, "--output-dir", str(folders[number])]
        monkeypatch.setattr(sys, "argv", arguments)
        importlib.import_module(name).main()

    step("step1_train_tokenizer", f"--base-model {base} --method continue --vocab-size 600",
         "--sources", TEXTS[0])  # fmt: skip
    step("step2_merge_tokenizer", f"--base-model {base} --ja-tokenizer {folders[1]}",
         "--check-sources", *HELD_OUT)  # fmt: skip
    step("step3_resize_model", f"--base-model {base} --tokenizer {folders[2]}")
    step(
        "step4_prepare_data",
        f"--tokenizer {folders[2]} --total-tokens 20000 --validation-tokens 2000 --block-size 512 "
        "--sft-examples 20 --sft-validation-examples 4 --max-length 512 --num-processes 1 "
        "--shares ja=80 en=20 --sft-shares ja=80 en=20",
        "--sources", *TEXTS, "--sft-sources", *CHATS,
    )  # fmt: skip
    step("step5_train_pt", f"{TRAINING} --model {folders[3]} --data {folders[4]}")
    step("step6_train_sft", f"{TRAINING} --model {folders[5]} --data {folders[4]} --samples 0")
    step(
        "step7_eval",
        f"--base-model {base} --tokenizer {folders[2]} --resized {folders[3]} --pretrained "
        f"{folders[5]} --sft {folders[6]} --max-chars 1500 --max-new-tokens 4 --window 256",
        "--sources", *HELD_OUT, "--conversations", "--choices", "--prompts", str(prompts(tmp_path)),
    )  # fmt: skip

    report = json.loads((folders[2] / "merge_report.json").read_text())["languages"]
    for language in ("zh", "en"):
        assert report[language]["identical_lines"] == report[language]["lines"]
    assert report["ja"]["tokens_per_char_after"] < 0.9 * report["ja"]["tokens_per_char_before"]
    # Any program that knows transformers loads the result, and reads it as the pipeline does.
    auto = AutoTokenizer.from_pretrained(folders[6])
    tokenizer = families.load_tokenizer(folders[6])
    ids = tokenizer.encode("ファイルを開きます。")
    assert auto("ファイルを開きます。", add_special_tokens=False)["input_ids"] == ids
    assert max(ids) >= tokenizer.first_new_id
    model = AutoModelForCausalLM.from_pretrained(folders[6])
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    before = AutoModelForCausalLM.from_pretrained(folders[3]).state_dict()
    after = model.state_dict()
    matrices = {name for name, tensor in before.items() if tensor.dim() == 2} - {
        "transformer.wpe.weight"
    }
    assert {name for name in before if not after[name].equal(before[name])} == matrices
    results = json.loads((folders[7] / "results.json").read_text())
    assert len(results["stages"]) == 4
    assert all(row["largest_difference"] == 0 for row in results["stages"][1]["kept"].values())


def prompts(folder: Path) -> Path:
    path = folder / "prompts.yaml"
    path.write_text('ja: [日本の首都はどこですか。]\nen: ["What is a file?"]\n', encoding="utf-8")
    return path
