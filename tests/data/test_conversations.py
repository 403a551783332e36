"""Conversation formats, reasons to reject one, and where a long one is cut."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.chatglm3.chat_format import Message
from chatglm_ja.data import conversations
from chatglm_ja.data.conversations import Conversation, read_messages
from chatglm_ja.data.readers import Reject, read_chunks
from chatglm_ja.sources import Source

Q_AND_A: list[Message] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("columns", "record"),
    [
        ("messages", {"messages": Q_AND_A}),
        (
            "conversations",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ),
        ("instruction+input>output", {"instruction": "q", "input": "", "output": "a"}),
        ("instruction+input>output", {"instruction": "q", "input": None, "output": "a"}),
        ("instruction>output", {"instruction": "q", "output": "a"}),
        ("instruction+context>response", {"instruction": "", "context": "q", "response": "a"}),
        ("prompt>response", {"prompt": "q", "response": " a\n", "id": 3}),
        ("question>answer", {"question": "q", "answer": "a", "label": 1}),
        ("conversations", {"messages": None, "conversations": Q_AND_A}),
        (
            "messages",  # a table that holds both forms
            {"messages": [{"from": None, "value": None, **turn} for turn in Q_AND_A]},
        ),
    ],
)
def test_formats(columns: str, record: dict[str, Any], named: bool) -> None:
    """With the columns given, and recognized by their usual names."""
    assert read_messages(record, columns if named else None) == Q_AND_A


def test_system_text_and_history_come_first() -> None:
    record = {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert read_messages(record, None) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q0"},
        {"role": "assistant", "content": "a0"},
        *Q_AND_A,
    ]
    own = {"system": "s", "messages": [{"role": "System", "content": "own"}, *Q_AND_A]}
    messages = read_messages(own, None)
    assert isinstance(messages, list)
    assert [message["content"] for message in messages] == ["own", "q", "a"]
    joined = {"instruction": "translate", "input": "this", "output": "a"}
    messages = read_messages(joined, None)
    assert isinstance(messages, list)
    assert messages[0]["content"] == "translate\nthis"


def test_tool_results_come_between_the_assistant_s_turns() -> None:
    roles = ["system", "user", "assistant", "observation", "assistant", "user", "assistant"]
    names = ["system", "human", "function_call", "tool", "gpt", "user", "assistant"]
    turns = [{"role": name, "content": str(i), "metadata": "m"} for i, name in enumerate(names)]
    messages = read_messages({"messages": turns}, None)
    assert isinstance(messages, list)
    assert [message["role"] for message in messages] == roles
    assert messages[3] == {"role": "observation", "content": "3", "metadata": "m"}


def say(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "missing column"),
        ({"messages": "hello"}, "wrong type"),
        ({"messages": []}, "empty list"),
        ({"messages": ["hello"]}, "wrong type"),
        ({"messages": [{"role": "moderator", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": None}]}, "wrong type"),
        (say("assistant", "user"), "roles out of order"),
        (say("user", "user", "assistant"), "roles out of order"),
        (say("user", "system", "assistant"), "roles out of order"),
        (say("user", "assistant", "assistant"), "roles out of order"),
        (say("user", "observation", "assistant"), "roles out of order"),
        ({"messages": [Q_AND_A[0], {"role": "assistant", "content": " \n"}]}, "empty answer"),
        ({"instruction": "q", "output": ""}, "empty answer"),
        ({"instruction": " ", "output": "a"}, "empty question"),
        ({"messages": [{"role": "user", "content": ""}, Q_AND_A[1]]}, "empty question"),
        ({"instruction": 5, "output": "a"}, "wrong type"),
        ({"instruction": "q\ud800", "output": "a"}, "lone surrogate"),
        ({"messages": [Q_AND_A[0], {"role": "assistant", "content": "a\0"}]}, "NUL"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "wrong type"),
    ],
)
def test_bad_conversations_have_reasons(record: dict[str, Any], reason: str) -> None:
    reject = read_messages(record, None)
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert reject.detail


def test_records_keep_their_numbers(tmp_path: Path) -> None:
    rows = [{"messages": Q_AND_A, "id": 1}, say("assistant"), {"messages": Q_AND_A}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source("ja", str(path))
    first, bad, last = conversations.parse_conversations(next(read_chunks(source)), source)
    assert first == Conversation(1, Q_AND_A, "1")
    assert isinstance(bad, tuple)
    assert bad[0] == 2
    assert last == Conversation(3, Q_AND_A, None)


@pytest.mark.parametrize(
    ("roles", "lengths", "room", "left_out"),
    [
        ("uaua", [5, 5, 5, 5], 20, 0),
        ("uaua", [5, 5, 5, 5], 19, 2),
        ("uaua", [5, 5, 5, 5], 10, 2),
        ("uaua", [5, 5, 5, 5], 9, 4),
        ("suaua", [3, 5, 5, 5, 5], 13, 2),
        ("suaua", [3, 5, 5, 5, 5], 12, 5),
        ("uaoaua", [5, 5, 5, 5, 5, 5], 25, 4),  # never between a call and its answer
    ],
)
def test_a_long_conversation_loses_its_oldest_exchanges(
    roles: str, lengths: list[int], room: int, left_out: int
) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "o": "observation"}
    messages = [{"role": names[role], "content": ""} for role in roles]
    assert conversations.last_exchanges(messages, lengths, room) == left_out
