"""Retention of the base's answers, against a direct computation and on a damaged model."""

import copy
import math
from typing import Any

import pytest
import torch

from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.paired import Baseline, is_measurable
from chatglm_ja.evaluation.retention import measure_retention, score_answers
from chatglm_ja.inference.generation import Answer
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.messages import IGNORE_INDEX
from tests.conftest import demo_texts

QUESTIONS = ["请说明“颜色函数”。", "什么是单元格？", "How do I print?"]
ANSWERS = [
    Answer("颜色函数返回一个数字。", 12, stopped=True),
    Answer("", 1, stopped=True),
    Answer("选择「文件 - 打印」，然后", 12, stopped=False),
]


@pytest.fixture
def conversations() -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


def test_bits_per_character_of_answers_follow_the_definition(
    model: LoadedModel, conversations: list[list[dict[str, Any]]]
) -> None:
    scores = score_answers(conversations, ANSWERS, Scorer(model, 256, 2))
    assert math.isnan(scores[1])
    for index in (0, 2):
        answer = ANSWERS[index]
        ids, labels = model.tokenizer.build_example(
            [*conversations[index], {"role": "assistant", "content": answer.text}]
        )
        assert ids[-1] == model.tokenizer.document_end
        if not answer.stopped:  # that it ends there was not the base's
            ids.pop()
        with torch.inference_mode():
            logits = model.model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        scored = [place for place in range(len(ids)) if labels[place] != IGNORE_INDEX]
        nats = -sum(logits[place - 1, ids[place]].item() for place in scored)
        expected = nats / math.log(2) / len(answer.text)
        assert scores[index] == pytest.approx(expected, rel=1e-5)


def test_of_a_long_answer_the_end_is_read(
    model: LoadedModel, conversations: list[list[dict[str, Any]]]
) -> None:
    long = Answer(demo_texts("zh", 1)[0][:120], 120, stopped=False)
    (bits,) = score_answers(conversations[:1], [long], Scorer(model, 24, 2))
    assert 0 < bits < 20


def test_a_stage_is_compared_with_the_base(
    model: LoadedModel, conversations: list[list[dict[str, Any]]]
) -> None:
    baseline = Baseline()
    scorer = Scorer(model, 256, 2)
    row = measure_retention("zh", conversations, ANSWERS, ANSWERS, scorer, baseline)
    assert row["in_language"]["mean"] == pytest.approx(2 / 3)  # the empty one is in none
    assert row["ended"]["mean"] == pytest.approx(2 / 3)
    assert row["characters"]["mean"] == pytest.approx((11 + 0 + 14) / 3)
    own = [Answer("はい", 2, stopped=False)] * 3
    row = measure_retention("zh", conversations, ANSWERS, own, scorer, baseline)
    assert row["bits_per_char"]["change"] == 0  # the same model and the base's answers
    assert row["in_language"]["change"] == pytest.approx(-2 / 3)
    assert row["ended"]["mean"] == 0
    assert row["characters"]["mean"] == 2
    row = measure_retention("ko", conversations, ANSWERS, own, scorer, baseline)
    assert row["in_language"] is None  # its letters are not known


def test_a_model_whose_answers_have_moved_is_caught(model: LoadedModel) -> None:
    """The model's own answers are less likely after its last layer norm changed its sign."""
    from chatglm_ja.inference import generation

    asked = [[{"role": "user", "content": line}] for line in demo_texts("zh", 12)]
    asked = [[{"role": "user", "content": messages[0]["content"][:20]}] for messages in asked]
    prompts = [model.tokenizer.build_prompt(messages) for messages in asked]
    base = generation.generate_answers(
        model, prompts, 12, sampling=generation.Sampling(), batch_size=12
    )
    damaged = LoadedModel(copy.deepcopy(model.model), model.tokenizer)
    with torch.no_grad():
        damaged.model.model.norm.weight.neg_()
    baseline = Baseline()
    measure_retention("zh", asked, base, base, Scorer(model, 256, 12), baseline)
    row = measure_retention("zh", asked, base, base, Scorer(damaged, 256, 12), baseline)
    assert row["bits_per_char"]["change"] > 0
    assert is_measurable(row["bits_per_char"])
