"""Questions from files, their answers in each decoding, and the measures of the answers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu import sentence_chrf

from chatglm_ja.data import dataset
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation import answers
from chatglm_ja.evaluation.answers import Question
from chatglm_ja.evaluation.paired import Baseline, is_measurable
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import GREEDY, Answer, Sampling
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.sources import Source
from chatglm_ja.training.settings import SftConfig
from tests.conftest import DATA, PROJECT

LANGUAGES = ("ja", "ko")


def ask(kind: str, text: str = "q", expected: str | None = None) -> Question:
    return Question(kind, [{"role": "user", "content": text}], expected)


def test_prompts_are_answered_in_each_decoding(model: LoadedModel) -> None:
    sampling = Sampling(2.0, 0.9)
    prompts = {ask("ja"): [1, 2], ask("ja"): [3]}  # equal questions are told apart
    first = dict(list(prompts.items())[:1])
    asked = {"greedy": first, "sampled": prompts}
    answered = answers.generate_decodings(model, asked, 9, sampling, seed=4)
    greedy = generation.generate_answers(model, [[1, 2]], 9, sampling=GREEDY)
    sampled = generation.generate_answers(model, [[1, 2], [3]], 9, sampling=sampling, seed=4)
    assert answered == {
        "greedy": dict(zip(first, greedy, strict=True)),
        "sampled": dict(zip(prompts, sampled, strict=True)),
    }
    assert greedy != sampled[:1]


def test_measures_of_answers() -> None:
    group = {
        ask("ja"): Answer("はい、そうです。", 5, True),
        ask("ja"): Answer("是", 5, False),
        ask("en"): Answer("no no no no no", 5, False),
        ask("code"): Answer("Dim x", 5, True),
    }
    measures = answers.measure_answers(group)
    assert measures == {
        "questions": 4,
        "in_language": pytest.approx(2 / 3),  # of three: code has no language
        "ended": 0.5,
        "repeated": pytest.approx(0.5 / 4),
        "longest_loop": 5,
    }
    *_, code = group
    assert answers.measure_answers({code: group[code]})["in_language"] is None
    rows = answers.measure_kinds(list(group), {"greedy": group})
    assert [(row["kind"], row["way"], row["questions"]) for row in rows] == [
        ("ja", "greedy", 2),
        ("en", "greedy", 1),
        ("code", "greedy", 1),
    ]
    assert rows[0]["in_language"] == 0.5


def test_answers_are_paired_with_their_questions() -> None:
    first, second = ask("ja", "q", "a!"), ask("en")
    answered = {
        "greedy": {first: Answer("a", 1, True)},
        "sampled": {second: Answer("c", 1, True), first: Answer("b", 2, False)},
    }
    (row,) = answers.pair_with_questions([first], answered)
    assert (row["question"], row["expected"]) == ("q", "a!")
    assert row["greedy"] == {"text": "a", "tokens": 1, "stopped": True}
    assert row["sampled"]["text"] == "b"


def test_fluent_answers_to_other_questions_are_caught() -> None:
    """They are in the language and come to an end; only likeness sees that they do not answer."""
    held_out = Source("ja", str(DATA / "heldout_sft.jsonl.gz"), where=("kind", "ja"))
    texts = [messages[-1]["content"] for messages in SourceReader().conversations(held_out)]
    questions = [ask("ja", expected=text) for text in texts]
    baseline = Baseline()

    def measure(own: list[str]) -> Any:
        answered = {
            q: Answer(text, 9, stopped=True) for q, text in zip(questions, own, strict=True)
        }
        measures = answers.measure_answers(answered)
        assert measures["in_language"] > 0.95 and measures["ended"] == 1
        (row,) = answers.measure_likeness(answered | {ask("ja"): Answer("", 0, True)}, baseline)
        assert (row["kind"], row["items"]) == ("ja", len(texts))
        return row

    halves = [text[: len(text) // 2] for text in texts]
    expected = [sentence_chrf(own, [text]).score for own, text in zip(halves, texts, strict=True)]
    assert measure(halves)["mean"] == pytest.approx(sum(expected) / len(texts))
    others = measure([*halves[1:], halves[0]])
    assert others["mean"] < 0.3 * sum(expected) / len(texts)
    assert is_measurable(others)


def test_examples_are_of_all_kinds() -> None:
    questions = [ask(kind, str(number)) for kind in ("ja", "en") for number in range(3)]
    questions += [ask("code", "0")]
    chosen = [(q.kind, q.text) for q in answers.choose_examples(questions, 4)]
    assert chosen == [("ja", "0"), ("ja", "1"), ("en", "0"), ("code", "0")]
    assert answers.choose_examples([], 4) == []


def test_questions_are_read_with_the_answers_expected(tmp_path: Path) -> None:
    prompts, path = tmp_path / "p.yaml", tmp_path / "chats.jsonl"
    prompts.write_text("ja: [q1, q2]\n")
    system = {"role": "system", "content": "s"}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(
        json.dumps({"messages": [system, *turns]})
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "open"}]})
        + "\n"
    )
    source = Source("ja", str(path))
    asked, held_out = answers.read_questions(prompts, [source, source], LANGUAGES, SourceReader())
    assert [(q.text, q.expected) for q in asked] == [("q1", None), ("q2", None)]
    assert [(q.kind, q.text, q.expected) for q in held_out] == [("ja", "s\nq", "a")] * 2
    path.write_text(json.dumps({"prompt": "q", "response": ""}) + "\n")
    with pytest.raises(DataError, match=r"chats.jsonl record 1: empty answer"):
        answers.read_questions(prompts, [source], LANGUAGES, SourceReader())
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "open"}]}) + "\n")
    with pytest.raises(DataError, match="ja/chats holds no conversation that ends with an answer"):
        answers.read_questions(prompts, [source], LANGUAGES, SourceReader())


@pytest.mark.parametrize("profile", ["demo", "chatglm3-6b"])
def test_questions_of_the_profiles(profile: str) -> None:
    prompts = answers.read_prompts(PROJECT / "prompts" / f"{profile}.yaml", LANGUAGES)
    assert set(prompts) >= {"ja", "zh", "en"}


def test_questions_are_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text('ja: ["\\uFEFFは\\u3099\\u200Bな\\r\\nは？ "]\n', encoding="utf-8")
    assert answers.read_prompts(path, LANGUAGES) == {"ja": ["ばな\nは？"]}


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
        ('ja: [a, "\\u200b"]\n', "ja, question 2 has no visible character"),
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


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("the cat, the cat", ["the", "cat", ",", "the", "cat"]),
        ("猫が好き。", ["猫", "が", "好", "き", "。"]),
        ("Basicの例 12.5%", ["Basic", "の", "例", "12", ".", "5", "%"]),
        ("スーパー𠮷野家", [*"スーパー𠮷野家"]),
        (" \n", []),
        ("été_1", ["été_1"]),
    ],
)
def test_units(text: str, units: list[str]) -> None:
    assert answers.split_units(text) == units


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c", 0.0),
        ("a b c d", 0.0),
        ("a b c d a b c d", 0.2),  # 5 four-grams, abcd twice
        ("a a a a a a", 2 / 3),
        ("", 0.0),
    ],
)
def test_repeated_share(text: str, share: float) -> None:
    assert answers.repeated_share(answers.split_units(text)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("a", 0),
        ("a a", 0),  # twice is not a loop
        ("a a a", 3),
        ("x a b a b a b c", 6),
        ("a b a b a b a", 7),
        ("a b c a b c", 0),
        ("p q q q r a b c a b c a b c s", 9),
        ("はい。はい。はい。", 9),
    ],
)
def test_longest_loop(text: str, length: int) -> None:
    assert answers.longest_loop(answers.split_units(text)) == length


def test_longest_loop_follows_the_definition() -> None:
    def by_definition(parts: list[str]) -> int:
        """Return the longest stretch that repeats a period at least three times."""
        best = 0
        for start in range(len(parts)):
            for end in range(start + 3, len(parts) + 1):
                stretch = parts[start:end]
                for period in range(1, len(stretch) // 3 + 1):
                    if all(a == b for a, b in zip(stretch, stretch[period:], strict=False)):
                        best = max(best, len(stretch))
        return best

    draw = random.Random(0)
    for _ in range(200):
        parts = [draw.choice("ab") for _ in range(draw.randrange(16))]
        assert answers.longest_loop(parts) == by_definition(parts), parts


def config_for(data: Path, model: Path, count: int) -> SftConfig:
    return SftConfig(
        model=Path("unused"), data=data, output_dir=model, samples=count, max_new_tokens=3
    )


def test_questions_and_expected_answers_are_those_of_the_conversations(
    resized_dir: Path, data_dir: Path, model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(data_dir, resized_dir, 5)
    rows = list(dataset.unpack_rows(dataset.load_rows(data_dir, "sft", "validation")))
    samples = answers._answer_questions(config, [("ja", row) for row in rows])
    assert len(samples) == 2
    for sample, row in zip(samples, rows, strict=True):
        messages = [
            {"role": "user", "content": sample["question"]},
            {"role": "assistant", "content": sample["expected"]},
        ]
        assert model.tokenizer.build_example(messages) == (
            row["input_ids"],
            row["labels"],
        )
        assert sample["language"] == "ja"
        assert sample["greedy"]["tokens"] <= 3
    answers.print_samples(config)
    assert capsys.readouterr().out == answers.describe_samples(samples) + "\n"
    answers.print_samples(config_for(data_dir, resized_dir, 1))
    assert "ended by themselves: 0 of 1 greedy, 0 of 1 sampled" in capsys.readouterr().out


def test_without_samples_nothing_is_printed(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.print_samples(config_for(data_dir, Path("no model is loaded"), 0))
    assert capsys.readouterr().out == ""


def test_a_full_gpu_is_one_log_line(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    monkeypatch.setattr(answers, "_answer_questions", full)
    answers.print_samples(config_for(data_dir, Path("unused"), 5))
    (record,) = caplog.records
    assert record.message.endswith("the GPU's memory is full: CUDA out of memory")


def test_the_first_answer_of_a_conversation_is_expected(model: LoadedModel) -> None:
    messages = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
        {"role": "assistant", "content": "四"},
    ]
    ids, labels = model.tokenizer.build_example(messages)
    start, end = answers._find_first_answer(labels)
    assert ids[:start] == model.tokenizer.build_prompt(messages[:1])
    assert ids[end] == model.tokenizer.pieces.index("<|user|>")
    assert model.tokenizer.decode(ids[start:end]).strip() == "二"


def test_the_end_of_an_answer_is_marked() -> None:
    answer = {"text": "長い" * 200, "tokens": 9, "stopped": False}
    sample = {"language": "ja", "question": "a\nb", "expected": "c", "sampled": answer}
    sample["greedy"] = answer | {"stopped": True}
    lines = answers.describe_samples([sample]).split("\n")
    assert lines[1] == "ja    a⏎b"
    assert lines[3].endswith("… ■") and lines[4].endswith("… …")
    assert lines[-1] == "ended by themselves: 1 of 1 greedy, 0 of 1 sampled"
