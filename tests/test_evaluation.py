"""Bits per character against a direct computation, and independence of window and batch size."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatglm_ja import chat, evaluation, generation
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source
from tests.conftest import demo_texts


@pytest.fixture(scope="module")
def model(resized_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(resized_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text[:150] for language in ("ja", "zh") for text in demo_texts(language, 5)]


def test_bits_per_character_are_those_of_the_definition(
    model: Any, encoder: Any, texts: list[str]
) -> None:
    bits = 0.0
    for text in texts:
        prefix, ids = chat.prefix_ids(encoder), encoder.encode(text)
        with torch.inference_mode():
            logits = model(torch.tensor([prefix + ids])).logits[0].double()
        for position, token in enumerate(ids, start=len(prefix)):
            bits -= logits[position - 1].log_softmax(dim=-1)[token].item() / math.log(2)
    score = evaluation.score_texts(model, encoder, texts, window=1024, batch_size=3)
    assert score.characters == sum(map(len, texts))
    assert score.tokens == sum(map(len, encoder.encode(texts)))
    assert score.bits_per_char == pytest.approx(bits / score.characters, rel=1e-6)


def test_batch_size_changes_nothing(model: Any, encoder: Any, texts: list[str]) -> None:
    scores = [
        evaluation.score_texts(model, encoder, texts, window=64, batch_size=size).bits_per_char
        for size in (1, 4, 32)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("length", [3, 10, 11, 16, 17, 100])
def test_windows_score_every_token_once(length: int) -> None:
    ids = list(range(length))
    scored = []
    for window, context in evaluation.windows(ids, 2, 10):
        assert len(window) <= 10
        assert 0 < context < len(window)
        scored += window[context:]
    assert scored == ids[2:]


def test_held_out_questions_are_asked_greedy_and_sampled(
    model: Any, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "r"}, {"role": "assistant", "content": "a"}],
    ]
    asked = []

    def answer(*arguments: Any, sampled: bool, **_: Any) -> list[generation.Answer]:
        asked.append((arguments[2], sampled))
        first = generation.Answer("はい、そうです。" if sampled else "是", 5, True)
        return [first, generation.Answer("Yes, it is.", 9, sampled)]

    monkeypatch.setattr(generation, "answer", answer)
    held_out = {"ja": talks, "zh": talks, "code": talks}
    rows = evaluation.answer_held_out(model, encoder, held_out, 9)
    prompts = [chat.build_prompt_ids(encoder, talk[:1]) for talk in talks]
    assert asked == [(prompts, False), (prompts, True)] * 3
    keys = ("kind", "way", "questions", "in_language", "ended")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("ja", "greedy", 2, 0.0, 0.5),
        ("ja", "sampled", 2, 0.5, 1.0),
        ("zh", "greedy", 2, 0.5, 0.5),
        ("zh", "sampled", 2, 0.0, 1.0),
        ("code", "greedy", 2, None, 0.5),
        ("code", "sampled", 2, None, 1.0),
    ]


def test_held_out_conversations_are_read_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    good = {"prompt": "q", "response": "a"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"messages": [{"role": "user",
                    "content": "open"}]}) + "\n")  # fmt: skip
    source = Source("ja", str(path))
    found = evaluation.read_held_out([source, source])
    assert [[message["content"] for message in talk] for talk in found["ja"]] == [["q", "a"]] * 2
    path.write_text(json.dumps(good | {"response": ""}) + "\n")
    with pytest.raises(DataError, match=r"talks.jsonl record 1: empty answer"):
        evaluation.read_held_out([source])
    path.write_text("")
    with pytest.raises(DataError, match="ja/talks holds no conversation that ends with an answer"):
        evaluation.read_held_out([source])


def test_nothing_to_score_is_an_error(model: Any, encoder: Any) -> None:
    with pytest.raises(DataError, match="the held-out file is empty"):
        evaluation.score_texts(model, encoder, [], 64, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n", "must map"), ("ja: hello\n", "ja must be a list"), ("a: [", "is not YAML")],
)
def test_bad_prompt_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        evaluation.read_prompts(path)
