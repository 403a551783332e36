"""Questions for a judge: both published forms, conversations turn by turn, the files written."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.evaluation import judged
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference import generation
from chatglm_ja.inference.models import LoadedModel

UNUSED = Path("unused")
MT_BENCH = [
    {"question_id": 7, "category": "coding", "turns": ["書いてください。", "もう一つ。"]},
    {"question_id": 9, "category": "math", "turns": ["いくつですか"]},
]
ELYZA = 'input,output,eval_aspect\n挙げてください。,案,- 具体的\n"数えて,ください。",三,\n'


def make_config(*paths: Path, **changes: Any) -> EvalConfig:
    return EvalConfig(
        output_dir=UNUSED, base_model=UNUSED, tokenizer=UNUSED, resized=UNUSED, pretrained=UNUSED,
        sft=UNUSED, sources=(), prompts=UNUSED, judge_questions=paths, **changes,
    )  # fmt: skip


def write_lines(path: Path, records: list[Any]) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    (tmp_path / "elyza.csv").write_text(ELYZA, encoding="utf-8")
    paths = [write_lines(tmp_path / "question.jsonl", MT_BENCH), tmp_path / "elyza.csv"]
    questions = judged.read_questions(paths)
    assert [q.turns for q in questions["question"]] == [
        ("書いてください。", "もう一つ。"), ("いくつですか",)
    ]  # fmt: skip
    first, second = questions["elyza"]
    assert first.record["question_id"] == 1 and second.record["question_id"] == 2
    assert first.record["output"] == "案" and first.record["eval_aspect"] == "- 具体的"
    assert second.turns == ("数えて,ください。",)


def test_a_later_turn_follows_the_models_own_answer(tmp_path: Path, model: LoadedModel) -> None:
    source = write_lines(tmp_path / "question.jsonl", MT_BENCH)
    config = make_config(source, max_new_tokens=5, temperature=0.0)
    questions = judged.read_questions(config.judge_questions)
    answered = judged.answer_questions(config, questions, model, "sft")
    long, short = answered["question"]
    messages = [{"role": "user", "content": "書いてください。"}]
    for turn, follow_up in enumerate(["もう一つ。", "終わり"]):
        prompt = model.tokenizer.build_prompt(messages)
        (answer,) = generation.generate_answers(model, [prompt], 5)
        assert long["choices"][0]["turns"][turn] == answer.text
        assert long["choices"][0]["ended"][turn] == answer.stopped
        messages += [
            {"role": "assistant", "content": answer.text}, {"role": "user", "content": follow_up}
        ]  # fmt: skip
    assert len(short["choices"][0]["turns"]) == 1
    judged.write_answers(tmp_path, {"sft": answered})
    lines = (tmp_path / "answers" / "question" / "sft.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [long, short]
    assert {name: short[name] for name in (*MT_BENCH[1], "model_id", "generate_params")} == {
        **MT_BENCH[1],
        "model_id": "sft",
        "generate_params": {"temperature": 0.0, "top_p": 0.8, "top_k": 50, "max_new_token": 5},
    }


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x"}, "found the columns prompt; expected turns, a list of texts"),
        ({"input": None}, "no turns"),
        ({"turns": []}, "no turns"),
        ({"turns": "x"}, "no turns"),
        ({"turns": ["x", 1]}, "no turns"),
        ({"turns": ["x", "\u200b"]}, "empty turn"),
        ({"input": "\ud800"}, "surrogate"),
    ],
)
def test_a_wrong_field_is_one_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(MT_BENCH[1]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=f"q.jsonl question 2: .*{message}"):
        judged.read_questions([path])


def test_two_questions_of_one_id_are_one_line(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "q.jsonl", [MT_BENCH[0], MT_BENCH[0]])
    with pytest.raises(DataError, match="question 2: the question_id 7 again"):
        judged.read_questions([source])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.jsonl", "", "holds no question"),
        ("q.jsonl", "{", r"is no file of questions \(Expecting property name"),
        ("q.jsonl", "[1]", r"is no file of questions \(found '\[1\]' on a line\)"),
        ("q.jsonl", "\udcff", r"is no file of questions \('utf-8' codec"),
        ("q.csv", "input,output\na\n", "different numbers of columns"),
        ("q.csv", "input\na,b\n", "different numbers of columns"),
        ("q.csv", "question,output\na,b\n", "found the columns question, output"),
    ],
)
def test_other_files_are_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        judged.read_questions([tmp_path / name])


def test_two_files_of_one_name_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has two files named question, .*: rename one"):
        make_config(tmp_path / "a" / "question.jsonl", tmp_path / "b" / "question.csv")
