"""Data sets of llm-jp-eval: prompts, metrics against its own definitions, bad files."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.errors import ArtifactError, ConfigError, DataError
from chatglm_ja.evaluation import llm_jp_eval
from chatglm_ja.evaluation.settings import EvalConfig, TaskFormat
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import Answer
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.storage.inputs import open_files

UNUSED = Path("unused")


def example(question: str, answer: str) -> dict[str, str]:
    return {"input": question, "output": answer}


DATA: dict[str, Any] = {
    "instruction": "質問に答えてください。",
    "output_length": 6,
    "metrics": ["exact_match"],
    "few_shots": [example("質問:一", "はい"), example("質問:二", "いいえ")],
    "samples": [example("質問:三", "はい"), example("質問:四", "ＡＢＣ １"), example("五", "五")],
}


def make_config(*paths: Path, **changes: Any) -> EvalConfig:
    return EvalConfig(
        output_dir=UNUSED, base_model=UNUSED, tokenizer=UNUSED, resized=UNUSED, pretrained=UNUSED,
        sft=UNUSED, sources=(), prompts=UNUSED, tasks=paths, **changes,
    )  # fmt: skip


def write_data(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {name: value for name, value in (DATA | changes).items() if value is not None}
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def test_the_text_prompt_is_the_suites_own(tmp_path: Path) -> None:
    path = write_data(tmp_path / "jemhopqa.json")
    (task,) = llm_jp_eval.read_tasks(make_config(path, task_shots=1))
    assert task.name == "jemhopqa"
    assert task.text_prompt("質問:三") == (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
        "要求を適切に満たす応答を書きなさい。\n\n### 指示:\n質問に答えてください。"
        "\n\n### 入力:\n質問:一\n\n### 応答:\nはい\n\n### 入力:\n質問:三\n\n### 応答:\n"
    )
    write_data(path, language="en")
    (task,) = llm_jp_eval.read_tasks(make_config(path, task_shots=0))
    assert task.text_prompt("Q").endswith("### Instruction:\n質問に答えてください。"
                                          "\n\n### Input:\nQ\n\n### Response:\n")  # fmt: skip


def test_a_conversation_has_the_examples_as_turns(tmp_path: Path) -> None:
    path = write_data(tmp_path / "t.json")
    (task,) = llm_jp_eval.read_tasks(make_config(path, task_shots=2))
    said = [(m["role"], m["content"]) for m in task.messages("質問:三")]
    assert said == [
        ("user", "質問に答えてください。\n\n質問:一"), ("assistant", "はい"),
        ("user", "質問:二"), ("assistant", "いいえ"), ("user", "質問:三"),
    ]  # fmt: skip
    (task,) = llm_jp_eval.read_tasks(make_config(path, task_shots=0))
    assert [m["content"] for m in task.messages("三")] == ["質問に答えてください。\n\n三"]


def test_examples_of_newer_versions_come_from_the_training_split(tmp_path: Path) -> None:
    path = write_data(tmp_path / "test" / "jnli.json", few_shots=None)
    config = make_config(path, task_shots=2)
    assert config.task_files() == [path]
    with pytest.raises(ConfigError, match=r"0 examples in few_shots: .* pass --task-shots 0"):
        llm_jp_eval.read_tasks(config)
    train = write_data(tmp_path / "train" / "jnli.json", few_shots=None)
    (task,) = llm_jp_eval.read_tasks(config)
    assert [shot.input for shot in task.shots] == ["質問:三", "質問:四"]
    assert config.task_files() == [path, train.resolve()]
    # The questions of the split itself are no examples of theirs.
    with pytest.raises(ConfigError, match="0 examples"):
        llm_jp_eval.read_tasks(make_config(train, task_shots=2))


# What fuzzywuzzy 0.18.0 with python-Levenshtein 0.21.1, llm-jp-eval's packages, gave for each pair.
# On 60,000 pairs of lines and parts of lines of the demo, in three languages, char_f1 was the same.
TOKEN_SORT_RATIOS = [
    ("", "", 100), ("。", "、", 100), ("a", "", 0), ("", "a", 0), ("YES", "yes", 100),
    ("é", "e", 0), ("café", "cafe", 86), ("£5", "5", 100), ("a_b", "a b", 67),
    ("東京 大阪", "大阪 東京", 100), ("½", "1", 0),
    ("CUMIPMT_ADD", "CUMIPMT_", 84),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected", "percent"), TOKEN_SORT_RATIOS)
def test_char_f1_is_the_suites_own(answer: str, expected: str, percent: int) -> None:
    pytest.importorskip("rapidfuzz", reason="needs requirements-extras.txt")
    assert llm_jp_eval.char_f1(answer, expected) == percent / 100


def test_scores_are_means_with_standard_errors(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer ends at an empty line, and full-width forms count as half-width ones."""
    texts = iter(["はい\n\n### 入力:\n次", "ABC 1", "六"])
    limits = []

    def answer(model: Any, prompts: Any, limit: int, **options: Any) -> list[Answer]:
        limits.append(limit)
        return [Answer(next(texts), 3, True) for _ in prompts]

    monkeypatch.setattr(generation, "generate_answers", answer)
    config = make_config(write_data(tmp_path / "t.json"), task_shots=2)
    tasks = llm_jp_eval.read_tasks(config)
    (row,) = llm_jp_eval.run_tasks(config, tasks, model, "base")
    # Of 1, 1, 0: variance 1/3 with n - 1, over n.
    assert row == {
        "task": "t", "metric": "exact_match", "questions": 3, "shots": 2,
        "value": pytest.approx(2 / 3), "stderr": pytest.approx(1 / 3),
    }  # fmt: skip
    assert limits == [6]


@pytest.mark.parametrize("task_format", list(TaskFormat))
def test_a_model_answers_in_both_formats(
    tmp_path: Path, model: LoadedModel, task_format: TaskFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    generate = generation.generate_answers

    def record(model: Any, prompts: Any, *arguments: Any, **options: Any) -> list[Answer]:
        seen.extend(prompts)
        return generate(model, prompts, *arguments, **options)

    monkeypatch.setattr(generation, "generate_answers", record)
    path = write_data(tmp_path / "t.json")
    config = make_config(path, task_shots=1, task_limit=1, task_format=task_format)
    tasks = llm_jp_eval.read_tasks(config)
    (row,) = llm_jp_eval.run_tasks(config, tasks, model, "base")
    assert row["questions"] == 1 and row["stderr"] is None
    tokenizer = model.tokenizer
    if task_format is TaskFormat.CHAT:
        expected = tokenizer.build_prompt(tasks[0].messages("質問:三"))
    else:
        text = tasks[0].text_prompt("質問:三")
        expected = [*tokenizer.document_start, *tokenizer.encode(text)]
    assert seen == [expected]


def test_a_question_that_is_too_long_is_one_line(tmp_path: Path, model: LoadedModel) -> None:
    samples = [example("長" * model.window, "短")]
    config = make_config(write_data(tmp_path / "t.json", samples=samples), task_shots=0)
    with pytest.raises(DataError, match=r"--tasks t: the longest prompt has .* fewer examples"):
        llm_jp_eval.run_tasks(config, llm_jp_eval.read_tasks(config), model, "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": None}, r"t.json is no data set of llm-jp-eval \(samples: field required\)"),
        ({"samples": []}, "samples: list should have at least 1 item"),
        ({"samples": [{"input": "a"}]}, r"samples.0.output: field required"),
        ({"samples": [example("a", "b"), {"input": 1, "output": "b"}]}, "samples.1.input: input"),
        ({"instruction": None}, "instruction: field required"),
        ({"output_length": 0}, "output_length: input should be greater than 0"),
        ({"output_length": "15"}, "output_length: input should be a valid integer"),
        ({"metrics": ["pearson"]}, "has the metrics pearson: expected exact_match or char_f1"),
        ({"metrics": []}, "has the metrics none"),
        ({"language": "zh"}, "language: input should be 'ja' or 'en'"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = make_config(write_data(tmp_path / "t.json", **changes), task_shots=0)
    with pytest.raises(DataError, match=message):
        llm_jp_eval.read_tasks(config)


@pytest.mark.parametrize("text", ["", "[1]", "{", '"\udcff"'])
def test_other_files_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"t\.json is no data set of llm-jp-eval"):
        llm_jp_eval.read_tasks(make_config(path))
    with pytest.raises(ArtifactError, match=r"nowhere\.json not found"):
        open_files("tasks", *make_config(tmp_path / "nowhere.json").task_files())


def test_metrics_of_other_kinds_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_data(tmp_path / "t.json", metrics=["pearson", "exact_match"])
    (task,) = llm_jp_eval.read_tasks(make_config(path, task_shots=0))
    assert task.metrics == ("exact_match",)
    assert "without its metrics pearson" in caplog.text


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "rapidfuzz":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    path = write_data(tmp_path / "t.json", metrics=["char_f1"])
    with pytest.raises(ConfigError, match=r"char_f1 needs rapidfuzz: run `pip install -r"):
        llm_jp_eval.read_tasks(make_config(path, task_shots=0))


def test_two_files_of_one_name_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tasks has two files named jnli, .*: rename one"):
        make_config(tmp_path / "dev" / "jnli.json", tmp_path / "test" / "jnli.json")
