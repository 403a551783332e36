"""Sample answers: the prompts are the starts of validation conversations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.data import dataset
from chatglm_ja.evaluation import validation_answers
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.training.settings import SftConfig


def config_for(data: Path, model: Path, count: int) -> SftConfig:
    return SftConfig(
        model=Path("unused"), data=data, output_dir=model, samples=count, max_new_tokens=3
    )


def test_questions_and_expected_answers_are_those_of_the_conversations(
    resized_dir: Path, data_dir: Path, model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(data_dir, resized_dir, 5)
    rows = list(dataset.unpack_rows(dataset.load_rows(data_dir, "sft", "validation")))
    samples = validation_answers._answer_questions(config, [("ja", row) for row in rows])
    assert len(samples) == 2
    for sample, row in zip(samples, rows, strict=True):
        messages = [
            {"role": "user", "content": sample["question"]},
            {"role": "assistant", "content": sample["expected"]},
        ]
        assert chat_format.build_example(model.tokenizer, messages) == (
            row["input_ids"],
            row["labels"],
        )
        assert sample["kind"] == "ja"
        assert sample["greedy"]["tokens"] <= 3
    validation_answers.print_samples(config)
    assert capsys.readouterr().out == validation_answers.describe_samples(samples) + "\n"
    validation_answers.print_samples(config_for(data_dir, resized_dir, 1))
    assert "ended by themselves: 0 of 1 greedy, 0 of 1 sampled" in capsys.readouterr().out


def test_without_samples_nothing_is_printed(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation_answers.print_samples(config_for(data_dir, Path("no model is loaded"), 0))
    assert capsys.readouterr().out == ""


def test_a_full_gpu_is_one_log_line(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    monkeypatch.setattr(validation_answers, "_answer_questions", full)
    validation_answers.print_samples(config_for(data_dir, Path("unused"), 5))
    (record,) = caplog.records
    assert record.message.endswith("the GPU's memory is full: CUDA out of memory")


def test_the_first_answer_of_a_conversation_is_expected(model: LoadedModel) -> None:
    messages = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
        {"role": "assistant", "content": "四"},
    ]
    ids, labels = chat_format.build_example(model.tokenizer, messages)
    start, end = validation_answers._find_first_answer(labels)
    assert ids[:start] == chat_format.build_prompt_ids(model.tokenizer, messages[:1])
    assert ids[end] == chat_format.special_id(model.tokenizer, "<|user|>")
    assert model.tokenizer.decode(ids[start:end]).strip() == "二"


def test_the_end_of_an_answer_is_marked() -> None:
    answer = {"text": "長い" * 200, "tokens": 9, "stopped": False}
    sample = {"kind": "ja", "question": "a\nb", "expected": "c", "sampled": answer}
    sample["greedy"] = answer | {"stopped": True}
    lines = validation_answers.describe_samples([sample]).split("\n")
    assert lines[1] == "ja    a⏎b"
    assert lines[3].endswith("… ■") and lines[4].endswith("… …")
    assert lines[-1] == "ended by themselves: 1 of 1 greedy, 0 of 1 sampled"
