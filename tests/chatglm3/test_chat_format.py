"""The conversation format: ChatGLM3's exact prompt ids, and the labels of answers."""

import json
from itertools import chain
from typing import Any

import pytest

from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.errors import DataError
from chatglm_ja.messages import IGNORE_INDEX
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
    trained = [index for index, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    assert all(label in (IGNORE_INDEX, index) for index, label in zip(ids, labels, strict=True))
    user = encoder.piece_to_id("<|user|>")
    expected = [
        *encoder.encode("\n"), *encoder.encode("東京です。"), user,
        *encoder.encode("\n"), *encoder.encode("どういたしまして。"), tokenizer.EOS_ID,
    ]  # fmt: skip
    assert trained == expected


def trained_ids(example: tuple[list[int], list[int]]) -> list[int]:
    """Return the ids that are trained, whose labels are the ids themselves."""
    pairs = [(i, label) for i, label in zip(*example, strict=True)]
    assert all(label in (IGNORE_INDEX, i) for i, label in pairs)
    return [i for i, label in pairs if label != IGNORE_INDEX]


def test_an_answer_without_loss_stays_as_context(encoder: Any, conversation: Any) -> None:
    messages = [*conversation[:2], {**conversation[2], "loss": False}, *conversation[3:]]
    example = chat_format.build_example(encoder, messages)
    assert example[0] == chat_format.build_example(encoder, conversation)[0]
    assert trained_ids(example) == [
        *encoder.encode("\n"), *encoder.encode("どういたしまして。"), tokenizer.EOS_ID,
    ]  # fmt: skip
    messages = [*conversation[:4], {**conversation[4], "loss": False}]
    user = encoder.piece_to_id("<|user|>")
    assert trained_ids(chat_format.build_example(encoder, messages)) == [
        *encoder.encode("\n"), *encoder.encode("東京です。"), user,
    ]  # fmt: skip


def test_tools_are_written_as_chatglm3_writes_them(encoder: Any) -> None:
    """The ids are those of format_conversation in ChatGLM3's finetune_chatmodel_demo."""
    tools = chat_format.write_tools([{"name": "get_weather", "required": []}])
    assert tools == (
        "Answer the following questions as best as you can. You have access to the following "
        'tools:\n[\n    {\n        "name": "get_weather",\n        "required": []\n    }\n]'
    )
    code = chat_format.write_call({"city": "大阪 'Osaka'\n", "days": 2, "now": True, "in": [None]})
    assert code == (
        "```python\ntool_call(city=\"大阪 'Osaka'\\n\", days=2, now=True, in=[None])\n```"
    )
    messages = [
        {"role": "system", "content": tools},
        {"role": "user", "content": "天気は？"},
        {"role": "assistant", "content": "調べます。"},
        {"role": "assistant", "content": code, "metadata": "get_weather"},
        {"role": "observation", "content": '{"temp": 21}'},
        {"role": "assistant", "content": "晴れです。"},
    ]

    def part(role: str, header: str, text: str) -> list[int]:
        ids = [*encoder.encode(header + "\n"), *encoder.encode(text)]
        return [encoder.piece_to_id(f"<|{role}|>"), *ids]

    parts = [
        part("system", "", tools), part("user", "", "天気は？"),
        part("assistant", "", "調べます。"), part("assistant", "get_weather", code),
        part("observation", "", '{"temp": 21}'), part("assistant", "", "晴れです。"),
    ]  # fmt: skip
    example = chat_format.build_example(encoder, messages)
    prefix = [encoder.piece_to_id("[gMASK]"), encoder.piece_to_id("sop")]
    assert example[0] == [*prefix, *chain(*parts), tokenizer.EOS_ID]
    # A call is trained, and the token that hands it over; what the tool returns is not.
    handed_over = parts[4][:1]
    assert trained_ids(example) == [
        *parts[2][1:], *parts[3], *handed_over, *parts[5][1:], tokenizer.EOS_ID,
    ]  # fmt: skip
    # Also if the conversation ends with the call.
    example = chat_format.build_example(encoder, messages[:4])
    assert example[0] == [*prefix, *chain(*parts[:4]), *handed_over]
    assert trained_ids(example) == [*parts[2][1:], *parts[3], *handed_over]


def test_a_training_example_starts_with_the_prompt(encoder: Any, conversation: Any) -> None:
    ids, _ = chat_format.build_example(encoder, conversation)
    prompt = chat_format.build_prompt_ids(encoder, conversation[:4])
    assert ids[: len(prompt)] == prompt


def test_an_unknown_role_is_refused(encoder: Any) -> None:
    with pytest.raises(DataError, match="'moderator' does not exist"):
        chat_format.build_prompt_ids(encoder, [{"role": "moderator", "content": "hi"}])
