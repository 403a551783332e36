"""Conversation formats, reasons to reject one, and where a long one is cut."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.data import conversations
from chatglm_ja.data.conversations import Conversation, read_messages
from chatglm_ja.data.readers import Reject, read_chunks
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.messages import Message
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
        ("query>response", {"query": "q", "response": "a"}),
        ("input>output", {"input": "q", "output": "a"}),
        ("instruction+input>response", {"instruction": "", "input": "q", "response": "a"}),
        ("question+context>answer", {"question": "q", "context": None, "answer": "a"}),
        ("conversations", {"messages": None, "conversations": Q_AND_A}),
        ("messages", {"messages": json.dumps(Q_AND_A)}),
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


def test_a_record_s_tools_come_before_its_system_text() -> None:
    tools = [{"name": "clock", "description": "時刻"}]
    expected = [
        {"role": "system", "content": "", "tools": tools},
        {"role": "system", "content": "s"},
        *Q_AND_A,
    ]
    for fields in ({"tools": tools}, {"tools": json.dumps(tools)}, {"functions": tools}):
        record = {"system_prompt": "s", "instruction": "q", "output": "a", **fields}
        assert read_messages(record, None) == expected
    record = {"messages": [{"role": "system", "content": "s"}, *Q_AND_A], "tools": tools}
    assert read_messages(record, None) == expected
    own = [{"role": "system", "content": "", "tools": tools}, *Q_AND_A]
    assert read_messages({"messages": own}, None) == own
    nothing: Any
    for nothing in (None, "", [], "[]"):
        assert read_messages({"messages": Q_AND_A, "tools": nothing}, None) == Q_AND_A


def test_a_record_s_weight_is_that_of_all_its_answers() -> None:
    untrained = [Q_AND_A[0], {**Q_AND_A[1], "loss": False}]
    for record in ({"messages": Q_AND_A}, {"query": "q", "response": "a"}):
        assert read_messages({**record, "weight": 0}, None) == untrained
        assert read_messages({**record, "weight": 1.0, "train": "true"}, None) == Q_AND_A
    # A column that holds the dialogue says nothing else.
    assert read_messages({"train": "q", "image": "a"}, "train>image") == Q_AND_A


@pytest.mark.parametrize(
    "record",
    [
        {"id": 1, "lang": "ja", "score": 0.5, "split": "train", "training_source": "web"},
        {"prompt": "q", "prompt_id": "1", "category": "Chat", "images": [], "audio": None},
    ],
)
def test_columns_that_carry_nothing_for_a_model_are_passed_over(record: dict[str, Any]) -> None:
    assert read_messages({"messages": Q_AND_A, **record}, None) == Q_AND_A


def test_a_missing_column_s_reject_begins_with_the_columns_found() -> None:
    reject = read_messages({"chosen": "x", "rejected": "y", "column_of_mine": "z"}, None)
    assert isinstance(reject, Reject)
    assert reject.detail.startswith("found chosen, rejected, column_of_mine: expected messages (")


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
@pytest.mark.parametrize("roles", ["a", "aoa"])
def test_the_assistant_s_turns_before_the_first_question_are_left_out(
    tmp_path: Path, system: list[Message], roles: str
) -> None:
    names = {"a": "gpt", "o": "tool"}
    opening = [{"role": names[role], "content": ""} for role in roles]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [*system, *opening, *Q_AND_A]}) + "\n")
    source = Source("ja", str(path))
    [conversation] = conversations.parse_conversations(next(read_chunks(source)), source, "NFC")
    assert conversation == Conversation(1, [*system, *Q_AND_A], None, opening_left_out=True)
    assert list(SourceReader().conversations(source)) == [[*system, *Q_AND_A]]


def test_a_call_comes_between_an_answer_and_an_observation() -> None:
    call = {"role": "assistant", "metadata": "clock", "content": "```python\ntool_call()\n```"}
    seen = {"role": "observation", "content": "12:00"}
    user, answer = Q_AND_A
    for messages in (
        [user, call], [user, answer, call, seen, answer], [user, call, seen, call, seen, answer],
    ):  # fmt: skip
        assert read_messages({"messages": messages}, None) == messages
    for messages in ([user, call, answer], [user, call, call], [user, call, user], [call, answer]):
        reject = read_messages({"messages": messages}, None)
        assert isinstance(reject, Reject)
        assert reject.reason == "roles out of order"
        assert "after call: expected observation" in reject.detail


def say(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "missing column"),
        ({"messages": "hello"}, "wrong type"),
        ({"messages": "[hello]"}, "unsupported messages"),
        ({"messages": []}, "empty list"),
        ({"messages": ["hello"]}, "wrong type"),
        ({"messages": [{"role": "moderator", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": None}]}, "wrong type"),
        (say("assistant", "user"), "roles out of order"),
        (say("system", "assistant"), "roles out of order"),
        (say("system"), "no question"),
        (say("observation", "user", "assistant"), "roles out of order"),
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
        ({"instruction": "q", "output": "a", "history": "x"}, "wrong type"),
        ({"instruction": "q", "output": "a", "system": {"text": "x"}}, "wrong type"),
        ({"instruction": "q", "output": "a", "tools": "a clock"}, "unsupported tools"),
        ({"instruction": "q", "output": "a", "image": "a.png"}, "unsupported image"),
        ({"instruction": "q", "output": "a", "weight": 0.5}, "unsupported weight"),
        ({"instruction": "q", "output": "a", "mask": 1}, "unsupported mask"),
        (
            {"instruction": "q", "output": "a", "use_in_training": False},
            "unsupported use_in_training",
        ),
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
    first, bad, last = conversations.parse_conversations(next(read_chunks(source)), source, "NFC")
    assert first == Conversation(1, Q_AND_A, "1")
    assert isinstance(bad, tuple)
    assert bad[0] == 2
    assert last == Conversation(3, Q_AND_A, None)


@pytest.mark.parametrize(
    ("roles", "rests"),
    [
        ("uaua", ["uaua", "ua"]),
        ("suaua", ["suaua", "sua"]),
        ("uaoaua", ["uaoaua", "ua"]),  # never between a call and its answer
        ("ssuauaoaua", ["ssuauaoaua", "ssuaoaua", "ssua"]),
        ("su", ["su"]),
    ],
)
def test_a_long_conversation_loses_its_oldest_exchanges(roles: str, rests: list[str]) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "o": "observation"}
    messages = [{"role": names[role], "content": str(n)} for n, role in enumerate(roles)]
    shortened = conversations.shorten(messages)
    assert ["".join(message["role"][0] for message in rest) for rest in shortened] == rests
    system = roles.count("s")
    for rest in shortened:
        assert rest == [*messages[:system], *messages[len(messages) - len(rest) + system :]]


def test_every_text_of_a_conversation_is_cleaned() -> None:
    """No carriage return, byte-order mark, zero-width or decomposed character is trained."""
    dirty, clean = "\ufeffは\u3099な\u200b\r\nか\u3099 \n", "ばな\nが"
    call = {"function": {"name": "f", "arguments": {"a": "か\u3099"}}}
    messages = [
        {"role": "system", "content": dirty}, {"role": "user", "content": dirty},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": dirty}, {"role": "assistant", "content": dirty},
    ]  # fmt: skip
    read = read_messages({"messages": messages}, None)
    assert isinstance(read, list)
    assert [message["content"] for message in read] == [clean, clean, "", clean, clean]
    pair = {"instruction": dirty, "output": dirty, "history": [[dirty, dirty]], "system": dirty}
    read = read_messages(pair, None)
    assert isinstance(read, list) and {message["content"] for message in read} == {clean}
    invisible = {"instruction": "q", "output": "\u200b\ufeff"}
    reject = read_messages(invisible, None)
    assert isinstance(reject, Reject) and reject.reason == "empty answer"
    read = read_messages({"prompt": "ア", "response": "ｱ"}, None, "NFKC")
    assert isinstance(read, list) and read[1]["content"] == "ア"


def test_the_texts_in_tools_and_calls_are_cleaned_and_checked() -> None:
    """Their characters only: blanks and empty lines may be code."""
    dirty, clean = "か\u3099\u200b \r\n\n\n\nx \n", "が \n\n\n\nx \n"
    user, answer = Q_AND_A

    def read(tools: Any, arguments: Any) -> list[Message] | Reject:
        call = {"function": {"name": "f", "arguments": arguments}}
        turns = [
            user,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "x"},
        ]
        return read_messages({"messages": [*turns, answer], "tools": tools}, None)

    messages = read(
        [{"name": dirty, dirty: 1}], {"a": [dirty, {dirty: 2}], "か\u3099": None, "n": 3}
    )
    assert isinstance(messages, list)
    assert messages[0]["tools"] == [{"name": clean, clean: 1}]
    assert messages[2]["call"] == {"name": "f", "arguments": {"a": [clean, {clean: 2}], "n": 3}}
    for bad, reason in (("x\ud800", "lone surrogate"), ("x\0", "NUL")):
        for reject in (read([{bad: 1}], {}), read([{"a": [bad]}], {}), read([], {"a": {bad: 1}})):
            assert isinstance(reject, Reject) and reject.reason == reason


def test_the_bytes_of_a_conversation_are_those_of_all_its_texts() -> None:
    call = {"name": "f", "arguments": {"あ": ["い", 1]}}
    messages = [*Q_AND_A, {"role": "assistant", "content": "", "call": call, "loss": False}]
    # The names of a call's own fields are counted as well.
    assert conversations.count_bytes(messages) == 2 + len("nameargumentsf") + 6


def test_what_instructs_or_forbids_is_not_lost() -> None:
    """Several question columns are joined, other names of system texts read, booleans obeyed."""
    joined = read_messages({"instruction": "i", "question": "q", "answer": "a"}, None)
    assert isinstance(joined, list) and joined[0]["content"] == "i\nq"
    for name in ("system_message", "systemPrompt"):
        messages = read_messages({"messages": Q_AND_A, name: "s"}, None)
        assert messages == [{"role": "system", "content": "s"}, *Q_AND_A]
    empty = [{"role": "system", "content": ""}, *Q_AND_A]
    assert read_messages({"messages": empty, "system": "s"}, None) == [
        {"role": "system", "content": "s"}, *Q_AND_A,
    ]  # fmt: skip
    for flag in ({"label": False}, {"ignore": True}, {"learn": False}):
        messages = read_messages({"messages": Q_AND_A, **flag}, None)
        assert isinstance(messages, list) and messages[-1]["loss"] is False
    for harmless in ({"label": 3}, {"label": "good"}, {"train_loss": 1.5}):
        assert read_messages({"messages": Q_AND_A, **harmless}, None) == Q_AND_A
    for unclear in ({"train_mask": [0, 0]}, {"weights": [0]}, {"sample_weight": 0}):
        assert isinstance(read_messages({"messages": Q_AND_A, **unclear}, None), Reject)
