"""lm-evaluation-harness gives the values of the project's own code on local tasks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import ConfigError
from chatglm_ja.evaluation import harness, multiple_choice
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference.models import Stage
from chatglm_ja.sources import Source
from tests.conftest import PROJECT, demo_texts

pytest.importorskip("lm_eval", reason="needs requirements-extras.txt")
task_manager = pytest.importorskip("lm_eval.tasks.manager")

TASK = """\
task: next_line
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""

ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
"""


def make_config(folder: Path | None, *names: str, limit: int = 0) -> EvalConfig:
    unused = Path("unused")
    return EvalConfig(
        output_dir=unused, base_model=unused, tokenizer=unused, resized=unused, pretrained=unused,
        sft=unused, sources=(), prompts=unused, harness_tasks=names, harness_folder=folder,
        harness_limit=limit,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions about the next line; the line break belongs to the choices."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line for text in demo_texts("ja", 40) for line in text.split("\n") if len(line) > 8]
    lines = list(dict.fromkeys(lines))
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as out:
        for n in range(40):
            choices = [f"\n{line[:30]}" for line in lines[4 * n : 4 * n + 4]]
            record = {"question": lines[-n - 1], "choices": choices, "answer": n % 4}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    (folder / "next_line.yaml").write_text(TASK.format(data=folder / "questions.jsonl"))
    return folder


@pytest.fixture(scope="module")
def manager(folder: Path) -> Any:
    return harness.load_tasks(make_config(folder, "next_line"))


@pytest.mark.parametrize("name", ["base", "resized"])
def test_accuracies_are_our_own(
    name: str, base_dir: Path, resized_dir: Path, folder: Path, manager: Any,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    stage = Stage(name, base_dir if name == "base" else resized_dir)
    scorer = Scorer(stage.load(), 256, 8)
    tokenizer = scorer.model.tokenizer.to_transformers()
    questions = multiple_choice.read_questions(
        [Source("ja", str(folder / "questions.jsonl"))], SourceReader()
    )
    own = multiple_choice.score_questions(scorer, questions, Baseline())["ja"]
    config = make_config(folder, "next_line")
    rows = harness.run_tasks(config, manager, scorer, tokenizer)
    values = {row["metric"]: row["value"] for row in rows}
    assert values["acc"] == pytest.approx(own["acc"])
    # The harness counts the line break of a choice among its characters, as we do.
    assert values["acc_norm"] == pytest.approx(own["acc_norm"])
    assert all(row["task"] == "next_line" and 0 < row["stderr"] < 0.1 for row in rows)
    config = make_config(folder, "next_*", limit=4)
    limited = harness.run_tasks(config, manager, scorer, tokenizer)
    assert limited[0]["value"] in (0, 0.25, 0.5, 0.75, 1)


def test_scores_of_whole_texts_are_our_own(
    resized_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity tasks: the prefix is not scored, and a spelled special token stays text."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    texts = [text[:200] for text in demo_texts("zh", 3)] + ["a <|user|> b </s>"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "rolling.yaml").write_text(ROLLING.format(data=data))
    config = make_config(tmp_path, "rolling")
    stage = Stage("resized", resized_dir)
    scorer = Scorer(stage.load(), 256, 8)
    tokenizer = scorer.model.tokenizer.to_transformers()
    (row,) = harness.run_tasks(config, harness.load_tasks(config), scorer, tokenizer)
    score = scorer.score_texts(texts)
    assert row["value"] == pytest.approx(score.bits_per_byte, rel=1e-6)


def test_data_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text(ROLLING.format(data=tmp_path / "nowhere.jsonl"))
    with pytest.raises(ConfigError, match=r"cannot load the task rolling: .*nowhere"):
        harness.load_tasks(make_config(tmp_path, "rolling"))


def test_unknown_tasks_and_folders_are_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is not in the folder is looked up among the harness's own tasks."""
    # Of those there are thousands; a folder with one of them is read in a moment.
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(task_manager, "__file__", str(tmp_path / "manager.py"))
    (tmp_path / "own.yaml").write_text(
        TASK.format(data=folder / "questions.jsonl").replace("task: next_line", "task: own")
    )
    assert harness.load_tasks(make_config(folder, "next_line", "own"))
    with pytest.raises(ConfigError, match="has no task jglue_of_nobody: `lm_eval ls tasks`"):
        harness.load_tasks(make_config(folder, "next_line", "own", "jglue_of_nobody"))
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        harness.load_tasks(make_config(folder / "nowhere", "next_line"))


def test_the_tasks_that_documents_name_exist() -> None:
    """Those of the commands in our documents, in the files of the pinned version."""
    tasks = Path(task_manager.__file__).parent
    known = {
        name
        for path in tasks.rglob("*.yaml")
        for name in re.findall(rb"^(?:task|group): *(\S+)", path.read_bytes(), re.MULTILINE)
    }
    assert len(known) > 1000
    named = set()
    for path in [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *PROJECT.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        commands = re.findall(r"--harness-tasks((?: \w[\w-]*)+)", text)
        named |= {*" ".join(commands).split(), *re.findall(r"`(ja_leaderboard_\w+)`", text)}
    assert len(named) > 5
    # my_task stands for one of the reader's own.
    assert {name for name in named if name.encode() not in known} == {"my_task"}


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-extras.txt"):
        harness.load_tasks(make_config(None, "hellaswag"))
