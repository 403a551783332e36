"""Parsing the common formats of conversations into messages (messages.py).

    columns                        record
    (by the usual names)           {"instruction": q, "input": more, "output": a}         Alpaca
                                   {"conversations": [{"from": "human", "value": q}, ...]}
                                   {"messages": [{"role": "user", "content": q}, ...]}
                                   {"query": q, "response": a}                and other names
    "dialogue"                     a column of messages, in any form of turns.py
    "title+body>reply"             question columns, the non-empty ones joined by a line break

A record's tools come first, then its "system" text, unless its messages bring their own, then
Alpaca's "history" of [question, answer] pairs. turns.py says which of a record's other fields are
obeyed, refused and passed over.

A conversation is rejected if its roles are out of order or a question or answer is empty. The
assistant's turns before the first question are left out, and counted: in the formats of the bases a
question comes before every answer.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chatglm_ja.data import cleaning, readers, turns
from chatglm_ja.data.readers import Chunk, Record, Reject
from chatglm_ja.data.settings import UNICODE_FORM
from chatglm_ja.data.turns import CALL, BadRecordError
from chatglm_ja.messages import Message, is_call
from chatglm_ja.sources import Source

# The roles that may follow a role; None is the beginning.
FOLLOWERS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user", "assistant", CALL),
    "system": ("system", "user", "assistant", CALL),
    "user": ("assistant", CALL),
    "assistant": ("user", CALL, "observation"),
    CALL: ("observation",),
    "observation": ("assistant", CALL),
}
# If a source names no columns: the first of MESSAGES that a record has, or else the first question,
# what follows it, and the first answer.
MESSAGES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "question", "prompt", "query", "input")
FURTHER = ("question", "query", "input", "context")
ANSWERS = ("output", "response", "completion", "answer")
# The fields of a message that hold text, and those that hold a JSON value.
TEXTS = ("content", "metadata")
VALUES = ("tools", "call")


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation in a valid order, and the number and id of its record.

    `opening_left_out` if turns of the assistant came before the first question.
    """

    record: int
    messages: list[Message]
    id: str | None = None
    opening_left_out: bool = False


def parse_conversations(
    chunk: Chunk, source: Source, unicode_form: str
) -> Iterator[Conversation | tuple[int, Reject]]:
    """Parse a chunk into cleaned conversations and, for bad records, their numbers and Rejects."""
    for number, record in readers.read_records(chunk, source):
        if isinstance(record, Reject):
            yield number, record
        elif isinstance(messages := read_messages(record, source.columns, unicode_form), Reject):
            yield number, messages
        else:
            rest = leave_out_opening(messages)
            is_cut = len(rest) < len(messages)
            yield Conversation(number, rest, readers.record_id(record, source), is_cut)


def read_messages(
    record: Record, columns: str | None, unicode_form: str = UNICODE_FORM
) -> list[Message] | Reject:
    """Return the cleaned messages of a record, or a Reject; `columns` are the source's."""
    try:
        messages = _parse_record(record, columns)
    except BadRecordError as error:
        return error.reject
    texts = itertools.chain.from_iterable(map(_find_texts, messages))
    if problem := next(filter(None, map(readers.check_characters, texts)), None):
        return problem
    messages = [_clean_message(message, unicode_form) for message in messages]
    return check_order(messages) or messages


def count_bytes(messages: Iterable[Message]) -> int:
    """Count the bytes of the texts in messages, tools and calls among them."""
    return sum(len(text.encode()) for message in messages for text in _find_texts(message))


def _find_texts(message: Message) -> Iterator[str]:
    """Yield the texts of a message, and those in its tools or its call."""
    return itertools.chain.from_iterable(
        _find_strings(message[name]) for name in (*TEXTS, *VALUES) if name in message
    )


def _find_strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value, the names in its objects among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from _find_strings(list(value.values()))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_find_strings, value))


def _clean_message(message: Message, unicode_form: str) -> Message:
    """Return a message with cleaned texts. Blanks and empty lines in tools and calls stay."""
    texts = {name: cleaning.clean(message[name], unicode_form) for name in TEXTS if name in message}
    values = {name: _clean_value(message[name], unicode_form) for name in VALUES if name in message}
    return {**message, **texts, **values}


def _clean_value(value: Any, unicode_form: str) -> Any:
    if isinstance(value, str):
        return cleaning.clean_characters(value, unicode_form)
    if isinstance(value, dict):
        return {
            cleaning.clean_characters(name, unicode_form): _clean_value(item, unicode_form)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_clean_value(item, unicode_form) for item in value]
    return value


def check_order(messages: Sequence[Message]) -> Reject | None:
    """Return what is wrong with the order of the roles, or an empty question or answer; or None.

    Turns of the assistant may come before the first question, if there is an answer to it.
    """
    before: str | None = None
    asked = answered = False
    for index, message in enumerate(messages, start=1):
        role = CALL if is_call(message) else message["role"]
        if role not in FOLLOWERS[before]:
            expected = " or ".join(FOLLOWERS[before])
            after = f"after {before}" if before else "at the start"
            return Reject(
                "roles out of order", f"message {index} is of {role}, {after}: expected {expected}"
            )
        asked = asked or role == "user"
        answered = asked and (answered or message["role"] == "assistant")
        says = message["content"].strip() or message.get("call")
        if asked and message["role"] in ("user", "assistant") and not says:
            kind = "question" if role == "user" else "answer"
            return Reject(f"empty {kind}", f"message {index}")
        before = role
    if not answered and any(message["role"] == "assistant" for message in messages):
        return Reject("roles out of order", "every answer comes before the first question")
    return None if asked else Reject("no question", "no message is of user")


def leave_out_opening(messages: Sequence[Message]) -> list[Message]:
    """Return messages without those before the first question, other than the system's."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return [*messages[: count_system(messages)], *messages[first:]]


def count_system(messages: Sequence[Message]) -> int:
    """Count the system's messages, which come first."""
    roles = [message["role"] for message in messages]
    return next((i for i, role in enumerate(roles) if role != "system"), len(roles))


def shorten(messages: Sequence[Message]) -> list[list[Message]]:
    """Return a conversation whole, without its oldest exchange, and so on to its last alone.

    Every one begins with a user's turn, so that no answer loses its question, after the system's
    messages, which are kept.
    """
    first = count_system(messages)
    turns_of_user = (i for i, message in enumerate(messages) if message["role"] == "user")
    return [[*messages[:first], *messages[turn:]] for turn in turns_of_user]


def _parse_record(record: Record, columns: str | None) -> list[Message]:
    """Read all messages of a record, in whatever order they are."""
    names = _split_columns(columns) if columns else _find_columns(record)
    messages = _parse_pair(record, names) if len(names) > 1 else _parse_column(record, names[0])
    # A column that holds the dialogue says nothing else, whatever its name.
    said = turns.said_fields({name: v for name, v in record.items() if name not in names})
    place = "the record"
    turns.refuse(said, turns.MEDIA, place)
    system: list[Message] = []
    for name in ("tools", "functions"):
        if tools := turns.parse_json(said.get(name), name, place):
            system.append({"role": "system", "content": "", "tools": tools})
    first = messages[0]
    if first["role"] == "system" and not first["content"].strip() and not first.get("tools"):
        messages = messages[1:]
    for name in ("system", "system_prompt", "system_message", "systemPrompt"):
        text = turns.read_text(said.get(name, ""), f"column {name!r}")
        if text.strip() and not (messages and messages[0]["role"] == "system"):
            system.append({"role": "system", "content": text})
    messages = [*system, *_parse_history(said.get("history")), *messages]
    return messages if turns.is_trained(said, place) else turns.without_loss(messages)


def _find_columns(record: Record) -> list[str]:
    """Return the column of messages, or those of the question and of the answer, by their names."""
    present = turns.said_fields(record)

    def first(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in present][:1]

    question, answer = first(QUESTIONS), first(ANSWERS)
    further = [name for name in FURTHER if name in present and name not in question]
    columns = first(MESSAGES) or (question and answer and [*question, *further, *answer])
    if columns:
        return columns
    raise BadRecordError(
        "missing column",
        f"found {', '.join(record)}: expected messages ({', '.join(MESSAGES)}) or a question "
        f"({', '.join(QUESTIONS)}) and an answer ({', '.join(ANSWERS)})",
    )


def _split_columns(columns: str) -> list[str]:
    """Split QUESTION[+QUESTION...]>ANSWER into its columns; one column of messages stays one."""
    questions, arrow, answer = columns.partition(">")
    return [*questions.split("+"), answer] if arrow else [columns]


def _parse_pair(record: Record, columns: Sequence[str]) -> list[Message]:
    """Read a question and its answer, which is the last of the columns."""
    texts = []
    for name in columns:
        value = record.get(name)
        # Many tables have null for a missing input.
        if name in record and value is None:
            value = ""
        elif reject := readers.check_text(value, name, record):
            raise BadRecordError(reject.reason, reject.detail)
        texts.append(str(value).strip())
    question = "\n".join(text for text in texts[:-1] if text)
    if not question:
        raise BadRecordError("empty question", f"nothing in {'+'.join(columns[:-1])}")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": texts[-1]}]


def _parse_column(record: Record, column: str) -> list[Message]:
    """Read a column of messages."""
    if column not in record:
        reject = readers.missing_column(column, record)
        raise BadRecordError(reject.reason, reject.detail)
    value = record[column]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = turns.parse_json(value, column, "the record")
    if not isinstance(value, list):
        kind = type(value).__name__
        raise BadRecordError("wrong type", f"column {column!r} holds {kind}, not a list")
    if not value:
        raise BadRecordError("empty list", f"no message in column {column!r}")
    return turns.parse_turns(value)


def _parse_history(history: Any) -> list[Message]:
    """Read a record's earlier questions and answers: pairs, or messages."""
    if not history:
        return []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return turns.parse_turns(history)
    texts: list[str] = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise BadRecordError("wrong type", "history is not a list of [question, answer]")
        texts += pair
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
