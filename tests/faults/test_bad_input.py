"""User mistakes, for every step: a one-line error that says what to do, and no traceback."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.forks import Forks
from tests.faults.ledger import Ledger
from tests.pipeline import STEPS, Runner

TEXT = '{"text": "これは問題のない文書です。"}\n'
LINE = "番号と名前だけの短い文書を、とても長い一行に書いたものです。" * 40_000


@dataclass(frozen=True)
class Case:
    """Flags for a step, run after `prepare` has put its files into {tmp}."""

    title: str
    step: int
    flags: str
    says: str  # part of the error message
    prepare: Callable[["Files"], object] = lambda files: None


@dataclass(frozen=True)
class Files:
    """A folder for bad input and for copies of the pipeline's folders to corrupt."""

    tmp: Path
    made: Path

    def write(self, name: str, text: str) -> None:
        (self.tmp / name).write_text(text, encoding="utf-8")

    def copied(self, pattern: str) -> Path:
        """Copy one of the pipeline's folders; return the file that matches `pattern`."""
        folder = pattern.partition("/")[0]
        shutil.copytree(self.made / folder, self.tmp / folder)
        return min(self.tmp.glob(pattern))

    def edited(self, name: str, **changes: object) -> None:
        """Copy a folder and change entries of a JSON file in it."""
        path = self.copied(name)
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lead_out(index: Path) -> None:
    """Make an index of weights name a file in another folder."""
    index.write_text(index.read_text().replace("model-00001-of", "../base/model-00001-of"))


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


TASK = '{"instruction": "?", "output_length": 5, "metrics": ["exact_match"], "few_shots": []}'
CHOICE = '{"question": "?", "choices": ["a", "b"], "answer": 2}\n'
ELSEWHERE = {"../../x": {"bytes": 1, "sha256": ""}}
JA = "--sources ja={tmp}/ja.jsonl"
MERGED = "--tokenizer {tmp}/step2_tokenizer"
RESIZED = "--model {tmp}/step3_model"
DATA = "--data {tmp}/step4_data"
CONFIG, SHARD = "base_model/config.json", "base_model/*.safetensors"
BASE = "--base-model {tmp}/base_model"
ONE = "--shares ja=1"
MIX = "--sources {tmp}/mix.yaml --shares ja=1"
CASES = [
    Case("a missing corpus", 1, JA, "ja.jsonl not found"),
    Case("a folder without text files", 1, "--sources ja={tmp}", "holds no file that ends with"),
    Case("an empty corpus", 1, JA, "holds no record", lambda f: f.write("ja.jsonl", "")),
    Case("a corpus that is not JSON", 1, JA, "broken JSON", lambda f: f.write("ja.jsonl", "{\n")),
    Case("a line of a million characters", 1, "--sources ja={tmp}/ja.txt", "endless line",
         lambda f: f.write("ja.txt", LINE)),
    Case("a source without a language", 1, "--sources ja.jsonl", "is not of the form"),
    Case("an unknown flag", 1, "--vocab_size 9", "unrecognized arguments"),
    Case("a number out of range", 1, "--vocab-size 0", "--vocab-size is 0, expected 1 to"),
    Case("a word instead of a number", 1, "--vocab-size many", "invalid int value: 'many'"),
    Case("contradictory settings", 1, "--normalization nfkc",
         "--normalization is for --method sentencepiece only"),
    Case("a missing vocabulary", 2, "--ja-tokenizer {tmp}/ja.model", "not found"),
    Case("a garbage vocabulary file", 2, "--ja-tokenizer {tmp}/ja.model",
         "is not a sentencepiece model", lambda f: f.write("ja.model", "rubbish")),
    Case("a base without config.json", 2, "--base-model {tmp}", "has no config.json"),
    Case("a truncated base tokenizer", 1, BASE, "not a sentencepiece model",
         lambda f: truncate(f.copied("base_model/tokenizer.model"))),
    Case("a flipped bit in step 1's output", 2, "--ja-tokenizer {tmp}/step1_tokenizer",
         "does not have the SHA-256", lambda f: flip(f.copied("step1_tokenizer/ja_bpe.model"))),
    Case("empty texts for the segmentation check", 2, "--check-sources ja={tmp}/ja.jsonl", "no",
         lambda f: f.write("ja.jsonl", "")),
    Case("config.json that is not JSON", 3, BASE, "is not JSON",
         lambda f: f.copied(CONFIG).write_text("{")),
    Case("a ChatGLM2 checkpoint", 3, BASE, "is a ChatGLM2",
         lambda f: f.edited(CONFIG, _name_or_path="THUDM/chatglm2-6b")),
    Case("a long-context variant", 3, BASE, "rope_ratio is 50",
         lambda f: f.edited(CONFIG, rope_ratio=50)),
    Case("a quantized checkpoint", 3, BASE, "is quantized",
         lambda f: f.edited(CONFIG, quantization_bit=4)),
    Case("another architecture", 3, BASE, "this is not a ChatGLM3-6B",
         lambda f: f.edited(CONFIG, multi_query_attention=False)),
    Case("config.json of a larger model", 3, BASE, "config.json",
         lambda f: f.edited(CONFIG, num_layers=3)),
    Case("a truncated shard", 3, BASE, "is truncated or damaged",
         lambda f: truncate(f.copied(SHARD))),
    Case("a missing shard", 3, BASE, "not found",
         lambda f: f.copied(SHARD).unlink()),
    Case("an index with a path outside its folder", 3, BASE, "lies outside of it",
         lambda f: lead_out(f.copied("base_model/*.index.json"))),
    Case("a tokenizer artifact without a manifest", 3, MERGED,
         "is not a finished artifact (no manifest): run step2_merge_tokenizer.py first",
         lambda f: f.copied("step2_tokenizer/manifest.json").unlink()),
    Case("a corrupt manifest", 3, MERGED, "manifest.json is damaged",
         lambda f: f.copied("step2_tokenizer/manifest.json").write_text("[1]")),
    Case("a manifest with a path outside its folder", 3, MERGED, "lies outside of it",
         lambda f: f.edited("step2_tokenizer/manifest.json", files=ELSEWHERE)),
    Case("the output of another step", 3, "--tokenizer {made}/step1_tokenizer",
         "was made by step1_train_tokenizer, expected the output of step2_merge_tokenizer"),
    Case("a share for a language without texts", 4, "--shares ja=1 ko=1", "--shares names ja, ko"),
    Case("a negative share", 4, "--shares ja=-1 zh=1 en=1", "must be one positive number"),
    Case("texts without the text column", 4, f"{JA} {ONE}", "missing column",
         lambda f: f.write("ja.jsonl", '{"body": "x"}\n')),
    Case("too many bad records", 4, f"{JA} {ONE}", "of the records are bad in",
         lambda f: f.write("ja.jsonl", TEXT * 9 + "{\n")),
    Case("too few texts for a share", 4,
         f"{JA} {ONE} --max-repeats 1 --min-characters 1", "ja has",
         lambda f: f.write("ja.jsonl", TEXT)),
    Case("a YAML file of numbers", 4, MIX, "mix.yaml",
         lambda f: f.write("mix.yaml", "- 1\n- 2\n")),
    Case("a garbage YAML file", 4, MIX, "mix.yaml",
         lambda f: f.write("mix.yaml", "{: :")),
    Case("a garbage parquet file", 4, f"--sources ja={{tmp}}/ja.parquet {ONE}", "damaged parquet",
         lambda f: f.write("ja.parquet", "PAR1")),
    Case("conversations without messages", 4, "--sft-sources ja={tmp}/ja.jsonl --sft-shares ja=1",
         "missing column", lambda f: f.write("ja.jsonl", TEXT)),
    Case("step 4 has not run", 5, DATA, "run step4_prepare_data.py first"),
    Case("a flipped bit in the data", 5, DATA, "does not have the SHA-256",
         lambda f: flip(f.copied("step4_data/pretrain_train*"))),
    Case("truncated weights", 5, RESIZED,
         "bytes, expected",
         lambda f: truncate(f.copied("step3_model/*.safetensors"))),
    Case("a link instead of the weights", 5, RESIZED, "lies outside of it",
         lambda f: link(f.copied("step3_model/*.safetensors"), f.made / "step3_model/x")),
    Case("rows of a different block size", 5, "--block-size 256", "has rows of 128 tokens"),
    Case("a rank of zero", 5, "--lora-rank 0", "--lora-rank is 0"),
    Case("nothing to train", 5, "--learning-rate 0 --no-train-embeddings", "nothing to train"),
    Case("a global batch larger than the data", 5, "--global-batch-size 5000",
         "but a step takes 5000"),
    Case("fp16 without a GPU", 5, "--precision fp16", "fp16 needs a GPU"),
    Case("ZeRO stage 3", 5, "--deepspeed {tmp}/ds.json", "asks for ZeRO stage 3",
         lambda f: f.write("ds.json", '{"zero_optimization": {"stage": 3}}')),
    Case("a DeepSpeed file that is not JSON", 5, "--deepspeed {tmp}/ds.json", "is not JSON",
         lambda f: f.write("ds.json", "stage: 2")),
    Case("too little disk space", 5, "--keep-checkpoints 1000000000", "free some"),
    Case("an output inside an input", 5, "--output-dir {made}/step4_data/out", "lies in the input"),
    Case("an output folder with other files", 5, "--output-dir {tmp}", "no step made it",
         lambda f: f.write("thesis.txt", "mine")),
    Case("a finished output with other settings", 5, "--seed 7 --output-dir {made}/step5_pt",
         "was made with seed=42, not 7: pass --overwrite"),
    Case("step 5 has not run", 6, "--model {tmp}/step5_pt", "run step5_train_pt.py first"),
    Case("step 4's data as the model of step 6", 6, "--model {made}/step4_data",
         "was made by step4_prepare_data, expected the output of step5_train_pt or step3_resize"),
    Case("missing questions", 7, "--prompts {tmp}/q.yaml", "q.yaml not found"),
    Case("questions without a language", 7, "--prompts {tmp}/q.yaml", "q.yaml",
         lambda f: f.write("q.yaml", "- what?\n")),
    Case("an answer outside the choices", 7, "--choices ja={tmp}/c.jsonl", "c.jsonl",
         lambda f: f.write("c.jsonl", CHOICE)),
    Case("a data set of llm-jp-eval without samples", 7, "--tasks {tmp}/jnli.json",
         "jnli.json is no data set of llm-jp-eval (samples: field required)",
         lambda f: f.write("jnli.json", TASK)),
    Case("questions for a judge with a wrong field", 7, "--judge-questions {tmp}/q.jsonl",
         "q.jsonl question 1: no turns (found the columns prompt; expected turns",
         lambda f: f.write("q.jsonl", '{"prompt": "?"}\n')),
    Case("no benchmark to run", 7, "--benchmarks-only",
         "needs --tasks, --judge-questions or --harness-tasks"),
    Case("a stage that has not been made", 7, "--chat --stage sft --sft {tmp}/step6_sft",
         "no model of the stage sft yet"),
    Case("no model to chat with", 7, "--chat --base-model {tmp} --resized {tmp} --pretrained {tmp} "
         "--sft {tmp}", "no model found"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_bad_input_is_one_line(
    pipeline: Runner, forks: Forks, ledger: Ledger, tmp_path: Path, case: Case
) -> None:
    case.prepare(Files(tmp_path, pipeline.folder))
    script = STEPS[case.step - 1]
    flags = case.flags.format(tmp=tmp_path, made=pipeline.folder).split()
    output = tmp_path / "output"
    with ledger.trial("input", f"step {case.step}: {case.title}") as row:
        error = forks.small(script, "--output-dir", str(output), *flags).error
        row.reads = error.replace(str(pipeline.folder), "…").replace(str(tmp_path), "…")
        assert case.says in error
        assert not output.exists()
