"""The steps as programs: from an empty folder to the report, in order and out of it."""

import dataclasses
import gzip
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.export.settings import ExportConfig
from chatglm_ja.settings import StepConfig, flag
from chatglm_ja.storage.manifest import read_manifest
from chatglm_ja.training.settings import SftConfig, TrainingConfig
from chatglm_ja.vocabulary.settings import (
    MergeTokenizerConfig,
    ResizeModelConfig,
    TrainTokenizerConfig,
)
from tests.conftest import DATA, PROJECT, demo_texts
from tests.pipeline import SMALL, STEPS, Runner, child_cpu_seconds, error_of, flags_of, free_port


def test_the_report_has_every_stage_and_language(pipeline: Runner) -> None:
    results = json.loads((pipeline.folder / "step7_eval" / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == [
        "base",
        "resized",
        "pretrained",
        "sft",
    ]
    base, resized = (stage["languages"] for stage in results["stages"][:2])
    for language in ("zh", "en"):
        assert results["segmentation"][language]["identical_share"] == 1.0
        assert base[language]["tokens"] == resized[language]["tokens"]
        # The new rows take a little probability; nothing else changed.
        assert 1.0 <= resized[language]["bits_per_char"] / base[language]["bits_per_char"] < 1.1
    assert resized["ja"]["tokens"] < 0.8 * base["ja"]["tokens"]
    last = results["stages"][-1]
    asked = {(row["kind"], row["way"]): row["questions"] for row in last["held_out"]}
    assert asked == {
        (kind, way): 25 for kind in ("ja", "zh", "en", "code") for way in ("greedy", "sampled")
    }
    for stage in results["stages"]:
        assert {row["questions"] for row in stage["choices"].values()} == {50}
        assert len(stage["answers"]) == 10 + 8
    assert all(row["largest_difference"] == 0 for row in results["stages"][1]["kept"].values())
    assert all(row["largest_difference"] > 0 for row in last["kept"].values())
    assert list(results["steps"]) == [name.removesuffix(".py") for name in STEPS[:7]]
    page = (pipeline.folder / "step7_eval" / "report.html").read_text(encoding="utf-8")
    assert "pretrained" in page and "<svg" in page
    assert results["steps"]["step5_train_pt"]["fingerprint"] in page


def test_a_finished_evaluation_prints_its_short_summary_again(pipeline: Runner) -> None:
    said = pipeline.said["step7_eval.py"]
    table, said_in_words = said.split("\n\n")
    assert len(table.splitlines()) == 2 + 4 and table.startswith("| stage ")
    headline, *findings, advice, report = said_in_words.splitlines()
    assert re.fullmatch(r"(No better|Better) in Japanese; \d+ of \d+ measures .*", headline)
    assert findings[0].startswith("  Japanese  ") and "ship" in advice.lower()
    assert report == f"report: {pipeline.folder / 'step7_eval' / 'report.html'}"
    assert pipeline.small("step7_eval.py").stdout == said


def test_the_card_lies_beside_the_weights(pipeline: Runner) -> None:
    card = (pipeline.folder / "step6_sft" / "README.md").read_text(encoding="utf-8")
    assert card == (pipeline.folder / "step7_eval" / "model_card.md").read_text(encoding="utf-8")
    assert "| ja/train_ja" in card  # the data
    assert "`max_steps`" in card  # the settings
    assert "| pretrained |" in card  # the results
    # The step that made the folder still takes it for its own.
    assert pipeline.small("step6_train_sft.py").returncode == 0


@pytest.mark.parametrize("folder", ["step5_pt", "step6_sft"])
def test_an_adapter_names_no_folder_of_this_machine(pipeline: Runner, folder: str) -> None:
    adapter = pipeline.folder / folder / "adapter"
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert str(pipeline.root) not in (adapter / "adapter_config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["step5_pt", "step6_sft"])
def test_an_adapter_finds_its_base_in_the_directory_of_both(
    pipeline: Runner, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the model card says."""
    monkeypatch.chdir(pipeline.folder)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        adapted = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter", dtype=torch.float32)
        merged: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=2e-3)


def test_chat_uses_the_latest_model(pipeline: Runner) -> None:
    result = subprocess.run(
        pipeline.command("step7_eval.py", "--chat", "--max-new-tokens", "5"),
        env=pipeline.environment,
        input="こんにちは\n/exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "chatting with sft" in result.stderr
    assert result.stdout.count("you> ") == 2
    said = pipeline.run("step7_eval.py", "--chat", "--stage", "sft", "--sft", "nowhere")
    assert "no model of the stage sft yet: expected one of base, resized, pretrained" in error_of(
        said
    )


def test_a_port_in_use_is_one_line(pipeline: Runner) -> None:
    pytest.importorskip("gradio", reason="needs requirements-extras.txt")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = pipeline.run("step7_eval.py", "--web", "--port", port)
    assert f"--port {port} of this machine cannot be used" in error_of(result)


def test_fine_tuning_ends_with_losses_by_source_and_samples(pipeline: Runner) -> None:
    folder = pipeline.folder / "step6_sft"
    sources = json.loads((folder / "sources.json").read_text())
    assert [row["source"] for row in sources] == [
        "ja/help-ja", "zh/help-zh", "en/help-en", "code/help-code",
    ]  # fmt: skip
    assert sum(row["examples"] for row in sources) == 60
    assert all(row["loss"] < row["loss_before"] for row in sources)
    said = pipeline.said["step6_train_sft.py"]
    assert "of 10 greedy" in said  # all that is kept for validation
    for kind in ("ja", "zh", "en", "code"):
        assert re.search(rf"^{kind} +\S.*\n +expected +\S", said, re.MULTILINE)


def test_the_folders_load_with_plain_transformers(pipeline: Runner) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("step3_model", "step5_pt", "step6_sft"):
        model = AutoModelForCausalLM.from_pretrained(pipeline.folder / name)
        tokenizer = AutoTokenizer.from_pretrained(pipeline.folder / name)
        assert type(model).__name__ == "GlmForCausalLM"
        assert len(tokenizer) <= model.config.vocab_size < len(tokenizer) + 64


def test_a_finished_step_does_nothing(pipeline: Runner) -> None:
    for script in ("step2_merge_tokenizer.py", "step5_train_pt.py"):
        started = child_cpu_seconds()
        result = pipeline.small(script)
        assert result.returncode == 0
        assert "is finished already; pass --overwrite to make it again" in result.stderr
        assert child_cpu_seconds() - started < 4


def test_other_settings_are_not_passed_over_in_silence(pipeline: Runner) -> None:
    result = pipeline.small("step5_train_pt.py", "--lora-rank", "3")
    assert "was made with lora_rank=16, not 3: pass --overwrite" in error_of(result)


def test_a_missing_artifact_names_the_step_to_run(unlocked: Runner) -> None:
    subprocess.run(["rm", "-r", str(unlocked.folder / "step3_model")], check=True)
    assert "run step3_resize_model.py first" in error_of(unlocked.small("step5_train_pt.py"))


def test_another_tokenizer_is_refused_with_both_fingerprints(unlocked: Runner) -> None:
    result = unlocked.small("step2_merge_tokenizer.py", "--policy", "kana", "--overwrite")
    assert result.returncode == 0, result.stderr
    for script in ("step3_resize_model.py", "step4_prepare_data.py", "step5_train_pt.py"):
        message = error_of(unlocked.small(script))
        assert len(set(re.findall(r"\b[0-9a-f]{12}\b", message))) == 2, message
        assert "--overwrite" in message
    assert unlocked.small("step4_prepare_data.py", "--overwrite").returncode == 0
    message = error_of(unlocked.small("step5_train_pt.py", "--overwrite"))
    assert "step2_merge_tokenizer" in message


def test_a_vocabulary_from_elsewhere_is_merged(pipeline: Runner) -> None:
    """A file, of step 1 or not; and the pieces that are used most of it."""
    folder = pipeline.root / "other"
    learned = folder / "ja.model"
    folder.mkdir()
    learned.write_bytes((pipeline.folder / "step1_tokenizer" / "ja_bpe.model").read_bytes())
    counts = {}
    for name, *flags in (
        ("artifact", "--ja-tokenizer", str(pipeline.folder / "step1_tokenizer/ja_bpe.model")),
        ("file", "--ja-tokenizer", str(learned)),
        ("limited", "--ja-tokenizer", str(learned), "--max-new-pieces", "500"),
    ):
        result = pipeline.small("step2_merge_tokenizer.py", *flags, "--output-dir", name)
        assert result.returncode == 0, result.stderr
        report = json.loads((pipeline.root / name / "merge_report.json").read_text())
        counts[name] = report["counts"]["added"]
        assert report["languages"]["zh"]["identical_share"] == 1.0
        assert "<svg" in (pipeline.root / name / "merge_report.html").read_text()
    assert counts["artifact"] == counts["file"] > counts["limited"] == 500
    inputs = json.loads((pipeline.root / "artifact" / "manifest.json").read_text())["inputs"]
    assert inputs["step1_train_tokenizer"]["path"] is not None


def test_a_step_run_again_gives_the_same_bytes(unlocked: Runner) -> None:
    """So that nothing that was made from it has to be made again."""
    for script, folder in (
        ("step1_train_tokenizer.py", "step1_tokenizer"),
        ("step2_merge_tokenizer.py", "step2_tokenizer"),
        ("step3_resize_model.py", "step3_model"),
    ):
        before = json.loads((unlocked.folder / folder / "manifest.json").read_text())
        result = unlocked.small(script, "--overwrite", PYTHONHASHSEED="7")
        assert result.returncode == 0, result.stderr
        after = json.loads((unlocked.folder / folder / "manifest.json").read_text())
        assert after["files"] == before["files"]
    assert unlocked.small("step5_train_pt.py").returncode == 0


def test_bad_vocabularies_are_one_line(pipeline: Runner, base_dir: Path) -> None:
    rubbish = pipeline.root / "rubbish.model"
    rubbish.write_bytes(b"no model")
    flags = ["--output-dir", str(pipeline.root / "bad")]
    for more, message in (
        (["--ja-tokenizer", str(rubbish)], "rubbish.model is not a sentencepiece model"),
        (
            ["--ja-tokenizer", "none.model"],
            "none.model not found: expected a file, or the output of step1",
        ),
    ):
        assert message in error_of(pipeline.small("step2_merge_tokenizer.py", *flags, *more))
    for content, message in (("", "holds no record"), ("あ" * 1_000_001, "endless line 1")):
        (pipeline.root / "bad.txt").write_text(content)
        for method in ("sentencepiece", "continue"):
            result = pipeline.small(
                "step1_train_tokenizer.py", *flags, "--method", method,
                "--sources", f"ja={pipeline.root / 'bad.txt'}",
            )  # fmt: skip
            assert message in error_of(result)
    assert not (pipeline.root / "bad").exists()


def test_another_base_is_refused(unlocked: Runner, base_dir: Path) -> None:
    result = unlocked.small("step3_resize_model.py", "--base-model", str(base_dir), "--overwrite")
    assert re.search(
        r"step2_merge_tokenizer was made with base_tokenizer \w{12}, but it is now \w{12}",
        error_of(result),
    )


def test_a_killed_step_leaves_nothing_for_the_next(unlocked: Runner) -> None:
    subprocess.run(["rm", "-r", str(unlocked.folder / "step5_pt")], check=True)
    process = subprocess.Popen(
        unlocked.command("step5_train_pt.py", "--max-steps", "1000"),
        env=unlocked.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "step 25/" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "run step5_train_pt.py first" in error_of(unlocked.small("step6_train_sft.py"))
    assert unlocked.small("step5_train_pt.py").returncode == 0
    assert not list(unlocked.folder.glob(".*"))


def test_step_4_killed_again_and_again_gives_the_same_bytes(pipeline: Runner) -> None:
    """With one process or two, killed or interrupted at any moment, it goes on where it was."""
    command = pipeline.command(
        "step4_prepare_data.py", *SMALL["step4_prepare_data.py"].split(),
        "--num-processes", "2", "--output-dir", str(pipeline.root / "killed"),
    )  # fmt: skip
    seconds = 0.5
    for signal_number in itertools.cycle((signal.SIGKILL, signal.SIGINT)):
        process = subprocess.Popen(
            command, env=pipeline.environment, stderr=subprocess.PIPE, text=True, process_group=0
        )
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal_number)
            _, said = process.communicate()
            assert "Traceback" not in said, said
        if process.returncode == 0:
            break
        seconds += 0.5
    assert seconds > 1
    before, after = (
        json.loads((folder / "manifest.json").read_text())["files"]
        for folder in (pipeline.folder / "step4_data", pipeline.root / "killed")
    )
    assert after == before
    assert not [p for p in pipeline.root.glob("*killed*") if p != pipeline.root / "killed"]


def test_texts_alone_and_conversations_alone(pipeline: Runner, tmp_path: Path) -> None:
    small = [*SMALL["step4_prepare_data.py"].split()]
    for name, left_out in (("texts", "--sft-sources"), ("talks", "--sources")):
        flags = [*small, left_out, "--output-dir", str(tmp_path / name)]
        result = pipeline.run("step4_prepare_data.py", *flags)
        assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "talks").glob("pretrain*"))
    assert not list((tmp_path / "texts").glob("sft*"))
    whole = pipeline.folder / "step4_data" / "pretrain_train-00000-of-00001.arrow"
    assert (tmp_path / "texts" / whole.name).read_bytes() == whole.read_bytes()
    resized = ("--model", str(pipeline.folder / "step3_model"), "--max-steps", "1", "--check")
    for script, data, message in (
        ("step5_train_pt.py", "talks", "was prepared without texts: run step4_prepare_data.py"),
        ("step6_train_sft.py", "texts", "was prepared without conversations: run step4_prepare_"),
    ):
        result = pipeline.run(script, *resized, "--data", str(tmp_path / data))
        assert message in error_of(result)
    talks = (*resized, "--data", str(tmp_path / "talks"), "--output-dir", str(tmp_path / "sft"))
    result = pipeline.run("step6_train_sft.py", *talks)
    assert "without texts: prepare some with step 4, or pass --replay 0" in error_of(result)
    result = pipeline.run("step6_train_sft.py", *talks, "--replay", "0")
    assert result.returncode == 0, result.stderr
    none = pipeline.run("step4_prepare_data.py", "--sources", "--sft-examples", "0")
    assert "there is nothing to prepare" in error_of(none)


def test_step_1_learns_the_same_from_text_in_any_form(tmp_path: Path, base_dir: Path) -> None:
    """No byte-order mark, carriage return, zero-width or decomposed character is learned."""
    texts = demo_texts("ja", 80)
    forms = {
        "composed": texts,
        "dirty": ["\ufeff" + unicodedata.normalize("NFD", text).replace("\n", "\u200b\r\n")
                  for text in texts],
    }  # fmt: skip
    learned = []
    for name, group in forms.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in group))
        result = Runner(tmp_path).run(
            "step1_train_tokenizer.py", "--sources", f"ja={path}", "--base-model", str(base_dir),
            "--vocab-size", "700", "--output-dir", str(tmp_path / name),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        learned.append((tmp_path / name / "ja_bpe.vocab").read_bytes())
    assert learned[0] == learned[1]


def test_bad_records_of_every_kind_are_passed_over(pipeline: Runner, tmp_path: Path) -> None:
    good = [{"text": f"これは問題のない文書で、番号は{i:,}です。" * 9, "id": i} for i in range(300)]
    lines = [json.dumps(row).encode() for row in good]
    lines[10:10] = [
        b'{"text": "broken',
        b'{"body": "no text"}',
        b'{"text": ["a", "list"]}',
        b'{"text": "NUL \\u0000"}',
        b'{"text": "half of a pair \\ud83d"}',
        b'{"text": "\xff\xfe"}',
        json.dumps(good[3] | {"text": "同じ番号の別の文書です。" * 9}).encode(),
    ]
    (tmp_path / "ja.jsonl").write_bytes(b"\n".join(lines))
    whole = gzip.compress(b"\n".join(lines[20:]))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-100])
    with open(tmp_path / "endless.txt", "wb") as file:
        file.writelines([b"y" * 10**6] * 100)
    turns = [{"role": "user", "content": "質問"}, {"role": "assistant", "content": "答え"}]
    talks = [[{**turns[0], "content": f"質問 {i}"}, turns[1]] for i in range(60)]
    talks[5:5] = [[], turns[::-1], [turns[0], {"role": "assistant", "content": ""}]]
    talks = [json.dumps({"messages": talk}) for talk in talks]  # type: ignore[misc]
    (tmp_path / "talks.jsonl").write_text("\n".join(talks))  # type: ignore[arg-type]
    result = pipeline.run(
        "step4_prepare_data.py", "--output-dir", str(tmp_path / "data"), "--max-rejects", "1",
        "--sources", *(f"ja={tmp_path / n}" for n in ("ja.jsonl", "cut.jsonl.gz", "endless.txt")),
        "--shares", "ja=1", "--total-tokens", "5000", "--validation-tokens", "500",
        "--sft-sources", f"ja={tmp_path / 'talks.jsonl'}", "--sft-shares", "ja=1",
        "--sft-examples", "50", "--sft-validation-examples", "5", "--near-duplicates", "0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rejects = [json.loads(line) for line in (tmp_path / "data/rejects.jsonl").open()]
    assert [(reject["file"], reject["line"], reject["reason"]) for reject in rejects[:-2]] == [
        ("talks.jsonl", 6, "empty list"),
        ("talks.jsonl", 7, "roles out of order"),
        ("talks.jsonl", 8, "empty answer"),
        ("ja.jsonl", 11, "broken JSON"),
        ("ja.jsonl", 12, "missing column"),
        ("ja.jsonl", 13, "wrong type"),
        ("ja.jsonl", 14, "NUL"),
        ("ja.jsonl", 15, "lone surrogate"),
        ("ja.jsonl", 16, "invalid UTF-8"),
        ("ja.jsonl", 17, "duplicate id"),
    ]
    assert [(r["file"], r["reason"]) for r in rejects[-2:]] == [
        ("cut.jsonl.gz", "damaged gzip"),
        ("endless.txt", "endless line"),
    ]


def test_bad_data_is_one_line_and_a_file_of_what_is_bad(pipeline: Runner, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": 5}\n')
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"- {{language: ja, path: {bad}, name: mine}}\n")
    flags = ["--shares", "ja=1", "--output-dir", str(tmp_path / "data")]
    result = pipeline.small("step4_prepare_data.py", "--sources", str(mix), *flags)
    message = error_of(result)
    assert "bad in ja/mine: 1 of 2 records (wrong type 1): see" in message
    (reject,) = (tmp_path / "data.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["line"] == 2
    flags += ["--max-rejects", "0.5"]
    result = pipeline.small("step4_prepare_data.py", "--sources", str(mix), *flags)
    assert "ja: no text is left to train on after the filters" in error_of(result)
    assert not (tmp_path / "data.rejects.jsonl").exists()


@pytest.mark.parametrize(
    ("script", "processes", "step", "output"),
    [
        ("step5_train_pt_multi_gpu.sh", "2", "step5_train_pt.py", "step5_pt"),
        ("step6_train_sft_multi_gpu.sh", "2", "step6_train_sft.py", "step6_sft"),
        # Two launchers, as on two machines.
        ("docs/two_hosts.sh", "1", "step5_train_pt.py", "step5_pt"),
    ],
)
def test_two_processes_train_as_one(
    pipeline: Runner, script: str, processes: str, step: str, output: str
) -> None:
    """ZeRO-2 over gloo: the same global batch gives the same losses to four digits."""
    two = pipeline.root / f"two_{Path(script).stem}"
    result = pipeline.run(
        script, *SMALL[step].split(), "--output-dir", str(two),
        NPROC_PER_NODE=processes, MASTER_PORT=free_port(),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads((two / "manifest.json").read_text())["counts"]
    assert counts["world_size"] == 2
    for kind in ("loss", "eval_"):
        one = pipeline.losses(pipeline.folder / output, kind)
        assert len(one) >= 4
        assert pipeline.losses(two, kind) == pytest.approx(one, rel=1e-4)


def test_two_processes_are_stopped_and_one_or_two_go_on(pipeline: Runner) -> None:
    """The state of two processes under ZeRO-2 is that of one: to the last bits of the losses."""
    flags = [*SMALL["step5_train_pt.py"].split(), "--evaluations", "2", "--max-steps", "8"]
    environment = pipeline.environment | {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port()}
    target = pipeline.root / "stopped"

    def go(script: str, *more: str, **extra: str) -> str:
        result = pipeline.run(script, *more, **extra)
        assert result.returncode == 0, result.stderr
        return result.stderr

    whole = pipeline.root / "undisturbed"
    go("step5_train_pt.py", *flags, "--output-dir", str(whole))
    process = subprocess.Popen(
        pipeline.command("step5_train_pt_multi_gpu.sh", *flags, "--output-dir", str(target)),
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "step 3/8" in line:
            process.send_signal(signal.SIGTERM)
            break
    said = process.stderr.read()
    assert process.wait() != 0
    assert "re-run the command to resume from step" in said
    (saved,) = (pipeline.root / "stopped.checkpoints").iterdir()
    subprocess.run(
        ["cp", "-r", str(saved.parent), f"{pipeline.root}/again.checkpoints"], check=True
    )
    other = [*flags, "--global-batch-size", "4", "--output-dir", str(target)]
    message = error_of(pipeline.run("step5_train_pt.py", *other))
    assert "with global_batch_size=8, not 4: use that run" in message
    said = go("step5_train_pt.py", *flags, "--output-dir", str(target))
    assert f"resuming from {saved}" in said
    again = pipeline.root / "again"
    go("step5_train_pt_multi_gpu.sh", *flags, "--output-dir", str(again), **environment)
    for folder in (target, again):
        for kind in ("loss", "eval_"):
            expected = pipeline.losses(whole, kind)
            assert pipeline.losses(folder, kind) == pytest.approx(expected, rel=1e-5)
        assert not folder.with_name(folder.name + ".checkpoints").exists()


def test_two_hosts_end_together(pipeline: Runner) -> None:
    """What one refuses ends the dry run, with its word."""
    result = pipeline.run("docs/two_hosts.sh", "--lora-rank", "0", MASTER_PORT=free_port())
    assert result.returncode == 1
    assert "error: --lora-rank is 0" in result.stdout
    assert "machine 0: " in result.stdout or "machine 1: " in result.stdout


def test_a_launcher_gives_help_without_a_gpu(pipeline: Runner) -> None:
    result = pipeline.run("step5_train_pt_multi_gpu.sh", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == pipeline.run("step5_train_pt.py", "--help").stdout


def test_a_launcher_says_what_is_wrong_once(pipeline: Runner) -> None:
    result = pipeline.run("step5_train_pt_multi_gpu.sh", "--lora-rank", "0", NPROC_PER_NODE="2")
    assert "--lora-rank is 0" in error_of(result)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("card", "environment", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", {}, "p2p=1 ib=1"),
        ("NVIDIA GeForce RTX 4090", {"NNODES": "2"}, "p2p=1 ib=0"),
        ("NVIDIA GeForce RTX 4090", {"NCCL_P2P_DISABLE": "0"}, "p2p=0 ib=1"),
        ("NVIDIA H100 80GB HBM3", {}, "p2p= ib="),
    ],
)
def test_cards_without_peer_access_are_told_to_nccl(
    pipeline: Runner, tmp_path: Path, card: str, environment: dict[str, str], expected: str
) -> None:
    said = 'echo "p2p=${NCCL_P2P_DISABLE:-} ib=${NCCL_IB_DISABLE:-}"'
    tools = {
        "nvidia-smi": f"printf '{card}\\n{card}\\n'",
        "python": f'case "$*" in *launch*) {said};; *) exec "{sys.executable}" "$@";; esac',
    }
    for name, line in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = pipeline.small(
        "step5_train_pt_multi_gpu.sh", "--output-dir", str(tmp_path / "new"),
        NPROC_PER_NODE="2", PATH=path, **environment,
    )  # fmt: skip
    assert result.stdout.strip() == expected, result.stderr


def test_step_1_refuses_another_language_and_step_2_takes_its_policy(
    base_dir: Path, tmp_path: Path
) -> None:
    runner = Runner(tmp_path)
    words = [
        "오늘",
        "날씨가",
        "매우",
        "좋습니다",
        "사람들은",
        "공원에서",
        "산책을",
        "하고",
        "있습니다",
    ]
    lines = [" ".join(words[i % 7 :] + words[: i % 5]) for i in range(50)]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    base = ["--base-model", str(base_dir)]
    learn = ["step1_train_tokenizer.py", *base, "--vocab-size", "300", "--sources"]
    for source in ("ja=texts.txt", "ko=texts.txt", "jp=texts.txt"):
        message = error_of(runner.run(*learn, source))
        assert "pass --policy letters" in message or "'jp' is no language code" in message
    learned = runner.run(*learn, "ko=texts.txt", "--policy", "letters")
    assert learned.returncode == 0, learned.stderr
    merged = runner.run("step2_merge_tokenizer.py", *base)
    assert merged.returncode == 0, merged.stderr
    manifest = read_manifest(runner.folder / "step2_tokenizer")
    assert manifest
    assert (manifest.arguments["policy"], manifest.counts["added"]) == ("letters", 300 - 259)
    again = runner.run("step2_merge_tokenizer.py", *base)
    assert "is finished already" in again.stderr
    # Learned by another program, the same pieces have no policy.
    model = str(runner.folder / "step1_tokenizer" / "ja_bpe.model")
    (tmp_path / "ko.model").write_bytes(Path(model).read_bytes())
    other = ["--ja-tokenizer", "ko.model", "--output-dir", "other"]
    message = error_of(runner.run("step2_merge_tokenizer.py", *base, *other))
    assert "japanese admits only 0 of 41 new pieces" in message


def test_what_a_gpu_needs_is_estimated_without_data(base_dir: Path, tmp_path: Path) -> None:
    runner = Runner(tmp_path / "nothing")
    runner.root.mkdir()
    result = runner.run("step5_train_pt.py", "--model", str(base_dir), "--estimate", "4")
    assert result.returncode == 0
    assert re.search(r"total +\d+\.\d\d$", result.stdout, re.MULTILINE)
    again = runner.run(
        "step5_train_pt_multi_gpu.sh", "--model", str(base_dir), "--estimate", "4",
        NPROC_PER_NODE="2",
    )  # fmt: skip
    assert (again.returncode, again.stdout) == (0, result.stdout)
    # The base's 4,009 ids and the 14,000 pieces of the profile, 259 of which the base has.
    for script in ("step5_train_pt.py", "step6_train_sft.py"):
        said = runner.run(
            script, "--model", str(base_dir), "--estimate", "4", CHATGLM_JA_PROFILE="chatglm3-6b"
        ).stdout
        assert "17,792 embedding rows" in said
    message = error_of(runner.run("step5_train_pt.py", "--estimate", "4"))
    assert "config.json not found: the sizes are read from it" in message


def test_data_of_other_blocks_and_processes_that_do_not_divide_are_said_once(
    pipeline: Runner,
) -> None:
    new = ["--output-dir", str(pipeline.root / "new")]
    message = error_of(pipeline.run("step5_train_pt.py", "--block-size", "256", *new))
    assert "has rows of 128 tokens, but --block-size is 256" in message
    message = error_of(pipeline.small("step5_train_pt_multi_gpu.sh", *new, NPROC_PER_NODE="3"))
    assert "--global-batch-size 8 cannot be divided evenly among 3 processes" in message


def test_check_stops_before_the_work(pipeline: Runner) -> None:
    fresh = pipeline.root / "fresh"
    result = pipeline.small("step5_train_pt.py", "--check", "--output-dir", str(fresh))
    assert result.returncode == 0
    assert "settings and inputs are good" in result.stderr
    assert not fresh.exists()


def test_no_gpu_and_no_process_count_is_one_line(pipeline: Runner) -> None:
    result = pipeline.small("step5_train_pt_multi_gpu.sh", NPROC_PER_NODE="")
    assert "set NPROC_PER_NODE" in error_of(result)


def test_a_breakpoint_in_a_step_is_hit(pipeline: Runner) -> None:
    """`python step5_train_pt.py` is the process that trains: a debugger stops in it."""
    lines = (PROJECT / "step5_train_pt.py").read_text().split("\n")
    number = next(i for i, line in enumerate(lines, 1) if "    run_training_step(" in line)
    commands = f"b {number}\nc\np config.lora_rank + 1000\ns\nq\n"
    result = subprocess.run(
        [sys.executable, "-m", "pdb", str(PROJECT / "step5_train_pt.py"), "--block-size=128",
         "--output-dir", str(pipeline.root / "debug")],
        input=commands, env=pipeline.environment, cwd=PROJECT, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert "1016" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        *zip(STEPS, (TrainTokenizerConfig, MergeTokenizerConfig, ResizeModelConfig,
                     PrepareDataConfig, TrainingConfig, SftConfig, EvalConfig, ExportConfig),
             strict=True),
        ("demo/build_base_model.py", StepConfig),
        ("demo/get_smollm2.py", StepConfig),
    ],
)  # fmt: skip
def test_help_answers_at_once_and_documents_every_setting(
    script: str, settings: type[StepConfig], tmp_path: Path
) -> None:
    started = child_cpu_seconds()
    result = Runner(tmp_path).run(script, "--help")
    assert child_cpu_seconds() - started < 3
    assert result.returncode == 0
    fields = dataclasses.fields(settings)
    assert {flag(field.name) for field in fields} <= flags_of(script)
    documented = re.sub(r"\s+", "", result.stdout)
    for field in fields:
        assert re.sub(r"\s+", "", field.metadata["help"]) in documented, field.name


def test_the_6b_profile_asks_for_the_model(tmp_path: Path) -> None:
    result = Runner(tmp_path).run("step2_merge_tokenizer.py", CHATGLM_JA_PROFILE="chatglm3-6b")
    assert "CHATGLM3_6B_DIR is not set" in error_of(result)
    result = Runner(tmp_path).run("step1_train_tokenizer.py", CHATGLM_JA_PROFILE="big")
    assert "expected one of demo, smollm2, chatglm3-6b" in error_of(result)


def test_the_demo_data_is_small_and_held_out() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2_500_000

    def records(name: str) -> list[dict[str, str]]:
        with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def ids(pattern: str) -> set[str]:
        names = [path.name for path in DATA.glob(pattern)]
        return {record["id"].split("#")[0] for name in names for record in records(name)}

    assert ids("heldout_*.gz") and not ids("train_*.gz") & ids("heldout_*.gz")
    for language in ("ja", "zh", "en"):
        trained, held_out = (
            {
                line
                for page in records(f"{part}_{language}.jsonl.gz")
                for line in page["text"].split("\n")
            }
            for part in ("train", "heldout")
        )
        assert held_out and not trained & held_out
    kinds = [record["kind"] for record in records("train_sft.jsonl.gz")]
    assert len(kinds) >= 1500
    assert set(kinds) == {"ja", "zh", "en", "code"}


def test_make_clean_removes_the_results_of_the_demo_only(tmp_path: Path) -> None:
    for path in ("artifacts/demo/step1_tokenizer", "artifacts/chatglm3-6b/step5_pt", ".venv"):
        (tmp_path / path).mkdir(parents=True)
    subprocess.run(["make", "-f", str(PROJECT / "Makefile"), "clean"], cwd=tmp_path, check=True)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".venv", "artifacts", "artifacts/chatglm3-6b", "artifacts/chatglm3-6b/step5_pt"]
