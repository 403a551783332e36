"""Benchmarks alone: a stage, no other measure, a folder of its own."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.evaluation.test_harness import TASK
from tests.evaluation.test_judged import MT_BENCH, write_lines
from tests.evaluation.test_llm_jp_eval import write_data
from tests.pipeline import Runner

HARNESS = "next_line"


@pytest.fixture(scope="module")
def flags(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The base alone: neither texts nor the folders of other steps are there."""
    folder = tmp_path_factory.mktemp("benchmarks")
    questions = [{"question": "問い", "choices": ["一", "二"], "answer": 0}] * 3
    data = write_lines(folder / "questions.jsonl", questions)
    (folder / "own.yaml").write_text(TASK.format(data=data))
    found = [
        "--benchmarks-only", "--base-model", str(base_dir), "--max-new-tokens", "4",
        "--tasks", str(write_data(folder / "jnli.json")),
        "--task-format", "chat", "--task-shots", "2",
        "--judge-questions", str(write_lines(folder / "mt_bench.jsonl", MT_BENCH)),
    ]  # fmt: skip
    if importlib.util.find_spec("lm_eval"):
        found += ["--harness-tasks", HARNESS, "--harness-folder", str(folder)]
    return found


def test_benchmarks_run_alone_on_one_stage(flags: list[str], tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    result = runner.run("step7_eval.py", *flags, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    folder = runner.folder / "step7_eval_base"
    assert {path.name for path in folder.iterdir()} == {
        "answers", "manifest.json", "results.json", "results.md", "settings.yaml"
    }  # fmt: skip
    (stage,) = json.loads((folder / "results.json").read_text())["stages"]
    assert [row["task"] for row in stage["tasks"]] == ["jnli"]
    assert stage["name"] == "base" and "judged" not in stage
    lines = (folder / "answers" / "mt_bench" / "base.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [7, 9]
    assert "| jnli | exact_match |         3 |     2 | 0." in result.stdout
    assert result.stdout.endswith(f"\nresults: {folder}\n")
    if importlib.util.find_spec("lm_eval"):
        assert {row["task"] for row in stage["harness"]} == {HARNESS}
        assert "### lm-evaluation-harness" in result.stdout
    # The same again prints the same, and other questions are refused.
    assert runner.run("step7_eval.py", *flags).stdout == result.stdout
    said = runner.run("step7_eval.py", *flags, "--task-limit", "1").stderr
    assert "was made with task_limit=0, not 1: pass --overwrite" in said
