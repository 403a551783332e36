"""Questions from files, asked in two ways, and the measures of their answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.errors import DataError
from chatglm_ja.evaluation import answers
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import Answer
from chatglm_ja.sources import Source
from tests.conftest import PROJECT

LANGUAGES = ("ja", "ko")


def test_every_prompt_is_asked_greedy_and_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(*arguments: Any, sampling: generation.Sampling, **_: Any) -> list[Answer]:
        asked.append((arguments[2], sampling))
        return [Answer(str(sampling.temperature), 1, True)]

    monkeypatch.setattr(generation, "generate_answers", answer)
    warm = generation.Sampling(0.5, 0.9)
    given = answers.ask("model", "encoder", [[1, 2]], 9, warm, "title")
    assert asked == [([[1, 2]], generation.GREEDY), ([[1, 2]], warm)]
    assert {way: found[0].text for way, found in given.items()} == {"greedy": "0", "sampled": "0.5"}


def test_answers_are_measured_by_language_end_and_repetition() -> None:
    given = [
        Answer("はい、そうです。", 5, True),
        Answer("是", 5, False),
        Answer("no no no no no", 5, False),
        Answer("Dim x", 5, True),
    ]
    measured = answers.measure_answers(given, ["ja", "ja", "en", "code"])
    assert measured == {
        "questions": 4,
        "in_language": pytest.approx(2 / 3),  # of code it is not told
        "ended": 0.5,
        "repeated": pytest.approx(0.5 / 4),
        "longest_loop": 5,
    }
    assert answers.measure_answers(given[3:], ["code"])["in_language"] is None
    rows = answers.measures_by_kind(["ja", "ja", "en", "code"], {"greedy": given})
    assert [(row["kind"], row["way"], row["questions"]) for row in rows] == [
        ("ja", "greedy", 2),
        ("en", "greedy", 1),
        ("code", "greedy", 1),
    ]
    assert rows[0]["in_language"] == 0.5


def test_answers_stand_beside_their_question() -> None:
    given = {"greedy": [Answer("a", 1, True)], "sampled": [Answer("b", 2, False)]}
    (row,) = answers.answers_by_question([("ja", "q")], given)
    assert row["question"] == "q"
    assert row["greedy"] == {"text": "a", "tokens": 1, "stopped": True}
    assert row["sampled"]["text"] == "b"


def test_held_out_conversations_are_read_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    good = {"prompt": "q", "response": "a"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"messages": [{"role": "user",
                    "content": "open"}]}) + "\n")  # fmt: skip
    source = Source("ja", str(path))
    found = answers.read_held_out([source, source])
    assert [[message["content"] for message in talk] for talk in found["ja"]] == [["q", "a"]] * 2
    path.write_text(json.dumps(good | {"response": ""}) + "\n")
    with pytest.raises(DataError, match=r"talks.jsonl record 1: empty answer"):
        answers.read_held_out([source])
    path.write_text("")
    with pytest.raises(DataError, match="ja/talks holds no conversation that ends with an answer"):
        answers.read_held_out([source])


@pytest.mark.parametrize("profile", ["demo", "chatglm3-6b"])
def test_the_profiles_questions(profile: str) -> None:
    prompts = answers.read_prompts(PROJECT / "prompts" / f"{profile}.yaml", LANGUAGES)
    assert set(prompts) >= {"ja", "zh", "en"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "must map"),
        ("", "must map"),
        ("ja: hello\n", "ja must be a list"),
        ("ja: [1, 2]\n", "ja must be a list"),
        ("ja: ['']\n", "ja must be a list"),
        ("ja: []\n", "ja must be a list"),
        ('ja: [a, "\\ud800"]\n', "ja, question 2: lone surrogate"),
        ("ja:\n  - question: hi\n", "ja must be a list of questions, each a text"),
        ("jp: [a]\n", "unknown language 'jp': expected ja, ko, zh, en, code"),
        ("a: [", "is not YAML"),
        ("ja: [2026-13-45]\n", "is not YAML"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        answers.read_prompts(path, LANGUAGES)
    with pytest.raises(DataError, match="not found"):
        answers.read_prompts(tmp_path / "none.yaml", LANGUAGES)
