"""Multiple choice: accuracies against a direct computation, and bad records."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation import multiple_choice
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.multiple_choice import ChoiceQuestion
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.sources import Source
from tests.conftest import DATA, demo_texts


@pytest.fixture(scope="module")
def questions() -> dict[str, list[ChoiceQuestion]]:
    """Two to four lines of the demo, of which one follows the question."""
    questions = {}
    for language in ("ja", "zh"):
        lines = [line for text in demo_texts(language, 12) for line in text.split("\n")[:2]]
        questions[language] = [
            ChoiceQuestion(f"{lines[n]}\n", tuple(lines[n + 1 : n + 3 + n % 3]), n % 2)
            for n in range(0, 12, 2)
        ]
    return questions


def test_accuracies_follow_the_definition(
    model: LoadedModel, questions: dict[str, list[ChoiceQuestion]]
) -> None:
    def log_likelihood(text: str, choice: str) -> float:
        prefix, alone = model.tokenizer.prefix, model.tokenizer.encode(text)
        ids = model.tokenizer.encode(text + choice)
        assert ids[: len(alone)] == alone  # a line break is a piece of its own
        with torch.inference_mode():
            logits = (
                model.model(torch.tensor([prefix + ids])).logits[0].double().log_softmax(dim=-1)
            )
        scored = range(len(alone), len(ids))
        return sum(logits[len(prefix) + place - 1, ids[place]].item() for place in scored)

    def best(values: list[float]) -> int:
        return max(range(len(values)), key=lambda index: values[index])

    rows = multiple_choice.score_questions(Scorer(model, 512, 5), questions, Baseline())
    for language, group in questions.items():
        right = [0, 0, 0]
        for question in group:
            given = [log_likelihood(question.text, choice) for choice in question.choices]
            alone = [log_likelihood("\n", choice) for choice in question.choices]
            lengths = [len(choice) for choice in question.choices]
            by_length = [value / length for value, length in zip(given, lengths, strict=True)]
            gains = [a - b for a, b in zip(given, alone, strict=True)]
            for way, values in enumerate((given, by_length, gains)):
                right[way] += best(values) == question.answer
        row = rows[language]
        assert row["questions"] == len(group)
        assert row["chance"] == pytest.approx(sum(1 / len(q.choices) for q in group) / len(group))
        counts = [row[name] * len(group) for name in multiple_choice.METRICS]
        assert counts == pytest.approx(right)


def test_the_demos_questions() -> None:
    path = str(DATA / "heldout_choice.jsonl.gz")
    sources = [Source(name, path, where=("language", name)) for name in ("ja", "zh", "en")]
    questions = multiple_choice.read_questions(sources, SourceReader())
    assert {language: len(group) for language, group in questions.items()} == {
        "ja": 50,
        "zh": 50,
        "en": 50,
    }
    # The right choice comes from a held-out page: no page that is trained on has it as a line.
    for language, group in questions.items():
        trained = {line for text in demo_texts(language, 9999) for line in text.split("\n")}
        assert not trained & {question.choices[question.answer] for question in group}


def test_examples_come_from_the_same_source_and_are_other_questions(tmp_path: Path) -> None:
    """The examples are the questions that follow, with their right choices, around the end."""
    rows = [{"question": q, "choices": [f"{q}0", f"{q}1"], "answer": 1} for q in "abca"]
    sources = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(Source("ja", str(path)))
    rows[1]["question"] = rows[2]["question"] = "x"
    Path(sources[1].path).write_text("".join(json.dumps(row) + "\n" for row in rows[1:3]))
    questions = multiple_choice.read_questions(sources[:1], SourceReader(), 2)["ja"]
    assert [question.text for question in questions] == [
        "bb1\n\ncc1\n\na", "cc1\n\naa1\n\nb", "aa1\n\naa1\n\nc", "bb1\n\ncc1\n\na"
    ]  # fmt: skip
    assert {question.choices for question in questions} == {(f"{q}0", f"{q}1") for q in "abc"}
    with pytest.raises(DataError, match=r"ja/two has 2 questions, too few for --choices-shots 1"):
        multiple_choice.read_questions(sources, SourceReader(), 1)


def test_characters_of_questions_are_cleaned_and_blanks_stay(tmp_path: Path) -> None:
    row = {"question": "\ufeffは\u3099な\r\n", "choices": [" か\u3099", "か\u200b"], "answer": 0}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row))
    (question,) = multiple_choice.read_questions([Source("ja", str(path))], SourceReader())["ja"]
    assert question == multiple_choice.ChoiceQuestion("ばな\n", (" が", "か"), 0)
    # Choices that differ in their form only are one.
    path.write_text(json.dumps(row | {"choices": ["が", "か\u3099"]}))
    with pytest.raises(DataError, match="no choices"):
        multiple_choice.read_questions([Source("ja", str(path))], SourceReader())


GOOD = {"question": "q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, "no question"),
        ({"question": None}, "no question"),
        ({"choices": ["a"]}, "no choices"),
        ({"choices": ["a", "a"]}, "no choices"),
        ({"choices": "ab"}, "no choices"),
        ({"choices": ["a", 1]}, "no choices"),
        ({"answer": 2}, "no answer, expected 0 to 1, the right choice, found 2"),
        ({"answer": -1}, "no answer"),
        ({"answer": True}, "no answer"),
        ({"answer": "b"}, "no answer"),
        ({"choices": ["a", "\ud800"]}, "surrogate"),
    ],
)
def test_bad_questions(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(DataError, match=f"q.jsonl record 2: .*{message}"):
        multiple_choice.read_questions([Source("ja", str(path))], SourceReader())


def test_no_question_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"ja/q .* holds no record"):
        multiple_choice.read_questions([Source("ja", str(path))], SourceReader())
