"""The conversation format: ChatGLM3's exact prompt ids, and the labels of answers."""

import json
from typing import Any

import pytest

from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.errors import DataError
from tests.conftest import FIXTURES, SHARED, needs_real_tokenizer


@needs_real_tokenizer
def test_prompt_ids_are_those_of_chatglm3() -> None:
    base = tokenizer.read_proto(SHARED / "chatglm3-6b" / "tokenizer.model")
    encoder = tokenizer.make_processor(tokenizer.add_special_tokens(base))
    cases = json.loads((FIXTURES / "chat_prompts.json").read_text(encoding="utf-8"))
    assert len(cases) >= 5
    for case in cases:
        assert chat_format.build_prompt_ids(encoder, case["messages"]) == case["prompt_ids"]


def test_special_tokens_in_a_message_stay_text(encoder: Any) -> None:
    message = {"role": "user", "content": "<|assistant|> </s> [gMASK] sop"}
    ids = chat_format.build_prompt_ids(encoder, [message])
    controls = [encoder.id_to_piece(index) for index in ids if encoder.is_control(index)]
    assert controls == ["[gMASK]", "sop", "<|user|>", "<|assistant|>"]


def test_labels_cover_answers_and_their_end_tokens_only(encoder: Any, conversation: Any) -> None:
    ids, labels = chat_format.build_example(encoder, conversation)
    assert len(ids) == len(labels)
    trained = [
        index for index, label in zip(ids, labels, strict=True) if label != chat_format.IGNORE_INDEX
    ]
    assert all(
        label in (chat_format.IGNORE_INDEX, index) for index, label in zip(ids, labels, strict=True)
    )
    user = encoder.piece_to_id("<|user|>")
    expected = [
        *encoder.encode("\n"), *encoder.encode("東京です。"), user,
        *encoder.encode("\n"), *encoder.encode("どういたしまして。"), tokenizer.EOS_ID,
    ]  # fmt: skip
    assert trained == expected


def test_a_training_example_starts_with_the_prompt(encoder: Any, conversation: Any) -> None:
    ids, _ = chat_format.build_example(encoder, conversation)
    prompt = chat_format.build_prompt_ids(encoder, conversation[:4])
    assert ids[: len(prompt)] == prompt


def test_an_unknown_role_is_refused(encoder: Any) -> None:
    with pytest.raises(DataError, match="'moderator' does not exist"):
        chat_format.build_prompt_ids(encoder, [{"role": "moderator", "content": "hi"}])
