"""Bits per character against a direct computation, and independence of window and batch size."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatglm_ja import chat, evaluation
from chatglm_ja.errors import DataError
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


def test_answers_stop_at_the_stop_ids(model: Any, encoder: Any) -> None:
    given = evaluation.answer(model, encoder, "あなたは誰ですか", 5)
    assert given.tokens == 5
    assert not given.stopped
    rows = model.get_output_embeddings().weight
    kept = rows[2].clone()
    with torch.no_grad():
        # </s> wins at the end of this prompt: the answer is empty and ended by itself.
        ids = torch.tensor([chat.build_prompt_ids(encoder, [{"role": "user", "content": "x"}])])
        hidden = model.model(ids).last_hidden_state[0, -1]
        rows[2] = 1000 * hidden
    given = evaluation.answer(model, encoder, "x", 5)
    with torch.no_grad():
        rows[2] = kept
    assert (given.text, given.tokens, given.stopped) == ("", 1, True)


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
