"""Turns of all forms as messages: speakers, tools, flags of training, and what is refused."""

import json
from typing import Any

import pytest

from chatglm_ja.data.turns import BadRecordError, parse_turns
from chatglm_ja.messages import Message

WARM = '{"temp": 21}'
SEEN: Message = {"role": "observation", "content": WARM}
ARGUMENTS = {"city": "大阪", "days": 2}
FUNCTION = {"name": "get_weather", "arguments": ARGUMENTS}
CALL: Message = {"role": "assistant", "content": "", "call": FUNCTION}
SPELLED = {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}


@pytest.mark.parametrize(
    ("role", "speakers"),
    [
        ("system", "system System developer"),
        ("user", "user USER human prompter"),
        ("assistant", "assistant gpt ChatGPT bing bard model bot ai"),
        ("observation", "observation tool function function-response Tool_Response ipython"),
    ],
)
def test_the_usual_names_of_speakers(role: str, speakers: str) -> None:
    for speaker in speakers.split():
        for turn in ({"role": speaker, "content": "x"}, {"from": speaker, "value": "x"}):
            assert parse_turns([turn]) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    "turns",
    [
        [  # OpenAI
            {"role": "assistant", "content": None, "tool_calls": [{"function": SPELLED}]},
            {"role": "tool", "tool_call_id": "c", "name": "get_weather", "content": WARM},
        ],
        [  # the older form
            {"role": "assistant", "content": "", "function_call": SPELLED},
            {"role": "function", "name": "get_weather", "content": WARM},
        ],
        [  # ShareGPT
            {"from": "function_call", "value": json.dumps(FUNCTION)},
            {"from": "observation", "value": WARM},
        ],
        [{"role": "tool_call", "content": json.dumps([SPELLED])}, SEEN],
        [  # ChatGLM3's fine-tuning data
            {"role": "tool", "name": "get_weather", "parameters": ARGUMENTS,
             "observation": {"temp": 21}},
        ],
        [{"role": "tool", "name": "get_weather", "parameters": ARGUMENTS, "content": None,
          "observation": WARM}],
        [  # a table, with nulls for what is absent
            {"role": "assistant", "content": None, "tool_call_id": None, "tool_calls": [
                {"id": "c", "function": {**FUNCTION, "arguments": {**ARGUMENTS, "x": None}}}
            ]},
            {**SEEN, "tool_calls": None, "tool_call_id": "c"},
        ],
    ],
)  # fmt: skip
def test_calls_of_tools_in_all_forms(turns: list[Any]) -> None:
    assert parse_turns(turns) == [CALL, SEEN]


def test_a_call_that_is_in_chatglm3_s_form_stays_so() -> None:
    code = "```python\ntool_call(city='大阪')\n```"
    for role in ("assistant", "function_call"):
        turn = {"role": role, "metadata": "get_weather", "content": code}
        assert parse_turns([turn, SEEN]) == [{**turn, "role": "assistant"}, SEEN]


def test_text_comes_before_the_call_that_it_announces() -> None:
    turn = {"role": "assistant", "content": "調べます。", "tool_calls": [{"function": FUNCTION}]}
    assert parse_turns([turn]) == [{"role": "assistant", "content": "調べます。"}, CALL]
    untrained = [{**message, "loss": False} for message in parse_turns([turn])]
    assert parse_turns([{**turn, "train": False}]) == untrained


def test_a_system_message_keeps_its_own_tools() -> None:
    tools = [{"name": "時計"}]
    for given in (tools, json.dumps(tools)):
        turn = {"role": "system", "content": "s", "tools": given}
        assert parse_turns([turn]) == [{"role": "system", "content": "s", "tools": tools}]
    assert parse_turns([{**turn, "tools": "[]"}]) == [{"role": "system", "content": "s"}]


@pytest.mark.parametrize(
    "flag",
    [
        {"loss": False}, {"loss": 0}, {"weight": 0.0}, {"weight": 0, "loss": None},
        {"train": "False"}, {"weight": "0"}, {"isTrainable": False}, {"loss_scale": 0},
        {"masked": True}, {"loss": True, "weight": 0},
    ],
)  # fmt: skip
def test_an_answer_that_is_not_to_be_trained(flag: dict[str, Any]) -> None:
    turn = {"role": "assistant", "content": "a"}
    assert parse_turns([{**turn, **flag}]) == [{**turn, "loss": False}]
    # The user's turns are never trained.
    turn["role"] = "user"
    assert parse_turns([{**turn, **flag}]) == [turn]


@pytest.mark.parametrize("flag", [{"loss": True}, {"weight": 1.0}, {"masked": 0}, {"loss": None}])
def test_an_answer_that_is_to_be_trained(flag: dict[str, Any]) -> None:
    turn = {"role": "assistant", "content": "a"}
    assert parse_turns([{**turn, **flag}]) == [turn]


def test_other_fields_are_passed_over() -> None:
    turn = {
        "from": "gpt",
        "value": "a",
        "text": "a",
        "markdown": "*a*",
        "lang": "ja",
        "toxic": False,
    }
    assert parse_turns([turn]) == [{"role": "assistant", "content": "a"}]


def test_parts_that_are_text_are_joined() -> None:
    parts = [
        {"type": "text", "text": "東京"},
        {"type": "text", "text": "です。", "image_url": None},
    ]
    assert parse_turns([{"role": "user", "content": parts}])[0]["content"] == "東京です。"


@pytest.mark.parametrize(
    ("field", "turn"),
    [
        ("weight", {"weight": 0.5}),
        ("loss", {"loss": [0, 1]}),
        ("train", {"train": "some"}),
        ("mask", {"mask": True}),
        ("train_detail", {"train_detail": [{"begin_offset": 0, "end_offset": 3}]}),
        ("shouldTrain", {"shouldTrain": False}),
        ("images", {"images": ["a.png"]}),
        ("refusal", {"refusal": "no"}),
        ("reasoning_content", {"reasoning_content": "hm"}),
        ("content", {"content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}),
        ("content", {"content": ["x"]}),
        ("tools", {"tools": [{"name": "f"}]}),
        ("tool_calls", {"tool_calls": [{"function": FUNCTION}, {"function": FUNCTION}]}),
        ("tool_calls", {"tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}),
        ("tool_calls", {"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}),
        ("tool_calls", {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
        ("tool_calls", {"tool_calls": "[" * 200 + "]" * 200}),
        ("tool_calls", {"tool_calls": [{"function": {"name": "f", "arguments": {"a-b": 1}}}]}),
        ("tool_calls", {"tool_calls": [{"function": {"name": "a\nb", "arguments": {}}}]}),
        ("tool_calls", {"role": "user", "tool_calls": [{"function": FUNCTION}]}),
        ("function_call", {"role": "function_call", "content": "get_weather()"}),
        ("function_call", {"role": "function_call", "content": json.dumps([FUNCTION] * 2)}),
    ],
)
def test_what_a_message_cannot_hold_is_refused_by_name(field: str, turn: dict[str, Any]) -> None:
    with pytest.raises(BadRecordError) as caught:
        parse_turns([{"role": "assistant", "content": "a", **turn}])
    assert caught.value.reject.reason == f"unsupported {field}"
    assert "message 1" in caught.value.reject.detail
