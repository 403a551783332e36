"""Conversations in the formats that are in use, as ChatGLM3's messages.

    columns                        record
    (found by name)                {"instruction": q, "input": more, "output": a}         Alpaca
                                   {"conversations": [{"from": "human", "value": q}, ...]}
                                   {"messages": [{"role": "user", "content": q}, ...]}
                                   {"prompt": q, "response": a}                and others' names
    "dialogue"                     a column of messages, of either form above
    "title+body>reply"             question columns, the filled ones joined by a line break

A record's "system" column, and Alpaca's "history" of [question, answer] pairs, come before them.
A conversation is bad, and no example is made of it, when its roles are out of order or an answer
is empty; one whose last question has no answer is only of no use.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chatglm_ja.data.readers import (
    Chunk,
    Record,
    Reject,
    check_characters,
    check_text,
    read_chunks,
    read_records,
    record_id,
    reject_error,
)
from chatglm_ja.sources import Source

Message = dict[str, str]

# Names of the speakers in the formats that are in use, as ChatGLM3's roles.
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "observation",
    "tool": "observation",
    "function": "observation",
}
# Who may speak after whom; None is the beginning.
FOLLOWERS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "observation"),
    "observation": ("assistant",),
}
# Where a source names no columns: the first of these that a record has all of.
USUAL_COLUMNS = (
    "messages",
    "conversations",
    "conversation",
    "instruction+input>output",
    "instruction>output",
    "instruction+context>response",
    "instruction>response",
    "prompt>response",
    "prompt>completion",
    "question>answer",
)


@dataclass(frozen=True)
class Conversation:
    """Messages that alternate as they should, and the record that they come from."""

    record: int
    messages: list[Message]
    id: str | None = None


def parse_conversations(
    chunk: Chunk, source: Source
) -> Iterator[Conversation | tuple[int, Reject]]:
    """The conversations of a chunk, in order, and its bad records with their numbers."""
    for number, record in read_records(chunk, source):
        if isinstance(record, Reject):
            yield number, record
            continue
        messages = read_messages(record, source.columns)
        if isinstance(messages, Reject):
            yield number, messages
            continue
        yield Conversation(number, messages, record_id(record, source))


def read_conversations(source: Source) -> Iterator[list[Message]]:
    """The messages of a source's conversations that end with an answer, in order.

    Raises DataError, with the file and the record's number, for the first one that is bad.
    """
    for chunk in read_chunks(source):
        for conversation in parse_conversations(chunk, source):
            if not isinstance(conversation, Conversation):
                raise reject_error(chunk.file, *conversation)
            if conversation.messages[-1]["role"] == "assistant":
                yield conversation.messages


def read_messages(record: Record, columns: str | None) -> list[Message] | Reject:
    """The messages of a record, or what is wrong with it."""
    if columns is None:
        filled = {name for name, value in record.items() if value is not None}
        names = (name for name in USUAL_COLUMNS if filled >= set(_names(name)))
        columns = next(names, None)
        if columns is None:
            usual = ", ".join(USUAL_COLUMNS)
            return Reject("missing column", f"none of {usual} among {', '.join(record)}")
    messages = _history(record)
    if isinstance(messages, Reject):
        return messages
    questions, arrow, answer = columns.partition(">")
    found = _pair(record, questions, answer) if arrow else _messages(record, columns)
    if isinstance(found, Reject):
        return found
    if found[0]["role"] == "system":
        messages = [message for message in messages if message["role"] != "system"]
    messages = [*messages, *found]
    for message in messages:
        for text in message.values():
            if reject := check_characters(text):
                return reject
    return check_order(messages) or messages


def check_order(messages: Sequence[Message]) -> Reject | None:
    """Whether everyone speaks in turn and no answer is empty."""
    before: str | None = None
    for index, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in FOLLOWERS[before]:
            expected = " or ".join(FOLLOWERS[before])
            after = f"after {before}" if before else "at the start"
            return Reject(
                "roles out of order", f"message {index} is of {role}, {after}: expected {expected}"
            )
        if role in ("user", "assistant") and not message["content"].strip():
            kind = "answer" if role == "assistant" else "question"
            return Reject(f"empty {kind}", f"message {index}")
        before = role
    return None


def last_exchanges(messages: Sequence[Message], lengths: Sequence[int], room: int) -> int:
    """How many of the oldest messages to leave out so that the others fit into `room` tokens.

    `lengths` are the messages' tokens. Cut is at a user's turn only, so that no answer stands
    without its question; a system message is kept besides. Returns len(messages) if not even
    the last exchange fits.
    """
    start = 1 if messages and messages[0]["role"] == "system" else 0
    room -= sum(lengths[:start])
    rest = sum(lengths[start:])
    for index in range(start, len(messages)):
        if messages[index]["role"] == "user" and rest <= room:
            return index - start
        rest -= lengths[index]
    return len(messages)


def _names(columns: str) -> list[str]:
    """The columns that a question-and-answer form names; a column of messages by itself."""
    questions, arrow, answer = columns.partition(">")
    return [*questions.split("+"), answer] if arrow else [columns]


def _pair(record: Record, questions: str, answer: str) -> list[Message] | Reject:
    texts = []
    for name in [*questions.split("+"), answer]:
        value = record.get(name)
        # An input that is not there is null in many tables.
        if name in record and value is None:
            value = ""
        elif reject := check_text(value, name, record):
            return reject
        texts.append(str(value).strip())
    question = "\n".join(text for text in texts[:-1] if text)
    if not question:
        return Reject("empty question", f"nothing in {questions}")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": texts[-1]},
    ]


def _messages(record: Record, column: str) -> list[Message] | Reject:
    turns = record.get(column)
    if column not in record:
        return Reject("missing column", f"no column {column!r} among {', '.join(record)}")
    if not isinstance(turns, list):
        return Reject("wrong type", f"column {column!r} holds {type(turns).__name__}, not a list")
    if not turns:
        return Reject("empty list", f"no message in column {column!r}")
    messages = []
    for index, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            return Reject("wrong type", f"message {index} is a {type(turn).__name__}")
        # A table that holds both forms has nulls in one of them.
        speaker = turn.get("role") or turn.get("from")
        content = turn.get("content")
        if content is None:
            content = turn.get("value")
        role = ROLE_NAMES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            known = ", ".join(ROLE_NAMES)
            return Reject("unknown role", f"message {index} is of {speaker!r}: expected {known}")
        if not isinstance(content, str):
            return Reject("wrong type", f"message {index} holds {type(content).__name__}, not text")
        message = {"role": role, "content": content}
        if isinstance(turn.get("metadata"), str):
            message["metadata"] = turn["metadata"]
        messages.append(message)
    return messages


def _history(record: Record) -> list[Message] | Reject:
    """What a record says came before: a system text, earlier questions with their answers."""
    messages: list[Message] = []
    system, history = record.get("system"), record.get("history")
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system})
    if not isinstance(history, list):
        return messages
    for pair in history:
        texts = pair if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            return Reject("wrong type", "history is not a list of [question, answer]")
        messages.append({"role": "user", "content": texts[0]})
        messages.append({"role": "assistant", "content": texts[1]})
    return messages
