"""Parsing the common formats of conversations into ChatGLM3's messages.

    columns                        record
    (by the usual names)           {"instruction": q, "input": more, "output": a}         Alpaca
                                   {"conversations": [{"from": "human", "value": q}, ...]}
                                   {"messages": [{"role": "user", "content": q}, ...]}
                                   {"prompt": q, "response": a}                and other names
    "dialogue"                     a column of messages, in either form above
    "title+body>reply"             question columns, the non-empty ones joined by a line break

A record's "system" column, and Alpaca's "history" of [question, answer] pairs, come first. A
conversation is rejected if its roles are out of order or a question or answer is empty.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chatglm_ja.chatglm3.chat_format import Message
from chatglm_ja.data import readers
from chatglm_ja.data.readers import Chunk, Record, Reject
from chatglm_ja.sources import Source

# The usual names of speakers, by ChatGLM3's roles.
SPEAKERS = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "function_call"),
    "observation": ("observation", "tool", "function"),
}
ROLES = {speaker: role for role, speakers in SPEAKERS.items() for speaker in speakers}
# The roles that may follow a role; None is the beginning.
FOLLOWERS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "observation"),
    "observation": ("assistant",),
}
# If a source names no columns, the first of these that a record has all of.
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
    """The messages of a conversation in a valid order, and the number and id of its record."""

    record: int
    messages: list[Message]
    id: str | None = None


def parse_conversations(
    chunk: Chunk, source: Source
) -> Iterator[Conversation | tuple[int, Reject]]:
    """Parse a chunk into conversations and, for bad records, their numbers and Rejects."""
    for number, record in readers.read_records(chunk, source):
        if isinstance(record, Reject):
            yield number, record
        elif isinstance(messages := read_messages(record, source.columns), Reject):
            yield number, messages
        else:
            yield Conversation(number, messages, readers.record_id(record, source))


def read_messages(record: Record, columns: str | None) -> list[Message] | Reject:
    """Return the messages of a record, or a Reject; `columns` are the source's."""
    if columns is None:
        present = {name for name, value in record.items() if value is not None}
        names = (name for name in USUAL_COLUMNS if present >= set(_split_columns(name)))
        columns = next(names, None)
        if columns is None:
            usual = ", ".join(USUAL_COLUMNS)
            return Reject("missing column", f"none of {usual} among {', '.join(record)}")
    before = _parse_history(record)
    if isinstance(before, Reject):
        return before
    messages = (_parse_pair if ">" in columns else _parse_messages)(record, columns)
    if isinstance(messages, Reject):
        return messages
    if messages[0]["role"] == "system":
        before = [message for message in before if message["role"] != "system"]
    messages = [*before, *messages]
    texts = (text for message in messages for text in message.values())
    problem = next(filter(None, map(readers.check_characters, texts)), None)
    return problem or check_order(messages) or messages


def check_order(messages: Sequence[Message]) -> Reject | None:
    """Return what is wrong with the order of the roles, or an empty question or answer; or None."""
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
    """Return how many of the oldest messages to drop so that the rest fits into `room` tokens.

    `lengths` are the messages' tokens. The rest begins with a user's turn, so that no answer loses
    its question; a system message is kept and not counted. Returns len(messages) if not even the
    last exchange fits.
    """
    start = 1 if messages and messages[0]["role"] == "system" else 0
    room -= sum(lengths[:start])
    rest = sum(lengths[start:])
    for index in range(start, len(messages)):
        if messages[index]["role"] == "user" and rest <= room:
            return index - start
        rest -= lengths[index]
    return len(messages)


def _split_columns(columns: str) -> list[str]:
    """Split QUESTION[+QUESTION...]>ANSWER into its columns; one column of messages stays one."""
    questions, arrow, answer = columns.partition(">")
    return [*questions.split("+"), answer] if arrow else [columns]


def _parse_pair(record: Record, columns: str) -> list[Message] | Reject:
    """Read a question and its answer from columns of their own."""
    texts = []
    for name in _split_columns(columns):
        value = record.get(name)
        # Many tables have null for a missing input.
        if name in record and value is None:
            value = ""
        elif reject := readers.check_text(value, name, record):
            return reject
        texts.append(str(value).strip())
    question = "\n".join(text for text in texts[:-1] if text)
    if not question:
        return Reject("empty question", f"nothing in {columns.partition('>')[0]}")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": texts[-1]}]


def _parse_messages(record: Record, column: str) -> list[Message] | Reject:
    """Read a column of messages."""
    turns = record.get(column)
    if column not in record:
        return readers.missing_column(column, record)
    if not isinstance(turns, list):
        return Reject("wrong type", f"column {column!r} holds {type(turns).__name__}, not a list")
    if not turns:
        return Reject("empty list", f"no message in column {column!r}")
    messages: list[Message] = []
    for index, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            return Reject("wrong type", f"message {index} is a {type(turn).__name__}")
        # A table with both forms has nulls in one of them.
        speaker = turn.get("role") or turn.get("from")
        content = turn.get("content")
        if content is None:
            content = turn.get("value")
        role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            known = ", ".join(ROLES)
            return Reject("unknown role", f"message {index} is of {speaker!r}: expected {known}")
        if not isinstance(content, str):
            return Reject("wrong type", f"message {index} holds {type(content).__name__}, not text")
        message = {"role": role, "content": content}
        if isinstance(turn.get("metadata"), str):
            message["metadata"] = turn["metadata"]
        messages.append(message)
    return messages


def _parse_history(record: Record) -> list[Message] | Reject:
    """Read a record's system text and its earlier questions and answers."""
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
