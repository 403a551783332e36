"""Parsing a turn of a conversation, in any of the usual forms, into messages (messages.py).

    {"role": "user", "content": q}    {"from": "human", "value": q}          OpenAI, ShareGPT
    {"role": "assistant", "tool_calls": [{"function": {"name": ..., "arguments": ...}}]}
    {"from": "function_call", "value": '{"name": ..., "arguments": ...}'}
    {"role": "tool", "name": ..., "parameters": ..., "observation": ...}     ChatGLM3's own

What else a turn, or a record of turns, says of itself is in one of four groups. A null, as tables
have for what is absent, says nothing.

    read         tools and their calls; the base's format says how they are written
    obeyed       FLAGS ("loss", "weight", "train" and the like), true or false, 1 or 0: an answer
                 that is not to be trained stays as context. Only answers are ever trained
    refused      what a message cannot hold: images, audio, video, a refusal, reasoning,
                 several calls at once; and another field whose name speaks of loss, training, masks
                 or weights, if it is a turn's, or a yes or no
    passed over  all else: ids, names, sources, languages, scores, other forms of the same text

What is refused raises BadRecordError, whose reason names the field.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from chatglm_ja.data.readers import MAX_DEPTH, Record, Reject
from chatglm_ja.messages import TEXT_PARTS, Message, write_json_text

CALL = "call"  # a turn of the assistant that is nothing but the call of a tool
# The usual names of speakers, by their roles.
SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": (
        "assistant", "gpt", "chatgpt", "bing", "bard", "claude", "gemini", "model", "bot",
        "chatbot", "ai",
    ),
    CALL: ("function_call", "tool_call"),
    "observation": (
        "observation", "tool", "function", "tool_response", "function_response", "tool_result",
        "function_result", "ipython",
    ),
}  # fmt: skip
ROLES = {speaker: role for role, speakers in SPEAKERS.items() for speaker in speakers}
# Fields that say whether an answer is trained, and the value that says yes.
FLAGS = {
    **dict.fromkeys(("loss", "loss_mask", "loss_scale", "loss_weight", "weight"), True),
    **dict.fromkeys(("train", "training", "trained", "trainable", "is_trainable"), True),
    **dict.fromkeys(("masked", "is_masked", "ignore_loss"), False),
}
# The same, of names that mean something else unless the value is a boolean. A label that is false
# is KTO's mark of a bad answer.
BOOLEAN_FLAGS = {"label": True, "learn": True, "ignore": False, "skip": False}
TRAINING_WORD = re.compile(r"(^|_)(loss|train[a-z]*|mask(s|ed|ing)?|weights?)(_|$)")
# Fields that a message cannot hold: those of a record or a turn, and those of a turn.
MEDIA = frozenset(
    {"image", "images", "image_url", "image_path", "audio", "audios", "video", "videos",
     "attachments"}
)  # fmt: skip
UNWRITABLE = MEDIA | {"refusal", "reasoning", "reasoning_content", "thinking"}


class BadRecordError(Exception):
    """A record cannot be used; `reject` says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reject = Reject(reason, detail)


def parse_turns(turns: Sequence[Any]) -> list[Message]:
    """Return the messages of turns, in whatever order they are. Raises BadRecordError."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        place = f"message {number}"
        if not isinstance(turn, dict):
            raise BadRecordError("wrong type", f"{place} is a {type(turn).__name__}")
        # A table with two forms of messages has nulls in one of them.
        said = said_fields(turn)
        own = _parse_turn(said, place)
        messages += own if is_trained(said, place, in_turn=True) else without_loss(own)
    return messages


def _parse_turn(said: Record, place: str) -> list[Message]:
    """Return the messages of a turn: a text, a call, both, or a call and its observation."""
    role = _parse_role(said, place)
    refuse(said, UNWRITABLE, place)
    if said.get("tools") and role != "system":
        raise BadRecordError("unsupported tools", f"{place} is of {role}, and has tools")
    content = next((said[name] for name in ("content", "value", "text") if name in said), None)
    header = said.get("metadata")
    header = {"metadata": header} if header and isinstance(header, str) else {}
    if role == CALL and not header:
        return [_parse_call(content, "function_call", place)]
    role = "assistant" if role == CALL else role  # with a header, a call is written already
    calls = [name for name in ("tool_calls", "function_call") if said.get(name)]
    if calls and role != "assistant":
        raise BadRecordError(f"unsupported {calls[0]}", f"{place} is of {role}, and has calls")
    if role == "observation" and not content and said.keys() & {"parameters", "observation"}:
        return _parse_call_and_observation(said, place)
    made = [_parse_call(said[name], name, place) for name in calls]
    if content is None and not made:
        detail = f"{place} has no content or value among {', '.join(said)}"
        raise BadRecordError("wrong type", detail)
    text = read_text("" if content is None else content, place)
    spoken = {"role": role, "content": text, **header}
    if tools := parse_json(said.get("tools"), "tools", place):
        spoken["tools"] = tools
    return made if made and not text.strip() else [spoken, *made]


def _parse_role(said: Record, place: str) -> str:
    speaker = said.get("role") or said.get("from")
    if speaker is None:
        raise BadRecordError("unknown role", f"{place} has no role or from among {', '.join(said)}")
    role = _find_role(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise BadRecordError("unknown role", f"{place} is of {speaker!r:.40}: expected {known}")
    return role


@functools.lru_cache
def _find_role(speaker: str) -> str | None:
    return ROLES.get(re.sub(r"[\s-]+", "_", speaker.strip().lower()))


def _parse_call_and_observation(said: Record, place: str) -> list[Message]:
    """Read a turn of ChatGLM3's fine-tuning data: a call, and what it returned, of any type."""
    call = {"name": said.get("name"), "arguments": said.get("parameters")}
    messages = [_parse_call(call, "parameters", place)]
    if "observation" in said:
        result = drop_nulls(said["observation"])
        text = result if isinstance(result, str) else write_json_text(result)
        messages.append({"role": "observation", "content": text})
    return messages


def _parse_call(value: Any, field: str, place: str) -> Message:
    """Read the call of a tool: an object, or the only one in a list, or either as JSON."""
    call = parse_json(value, field, place)
    if isinstance(call, list):
        if len(call) != 1:
            raise BadRecordError(
                f"unsupported {field}",
                f"{place} makes {len(call)} calls at once: expected one at a time",
            )
        call = call[0]
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    name, arguments = None, None
    if isinstance(call, dict):
        name = call.get("name")
        arguments = parse_json(call.get("arguments", call.get("parameters")), field, place) or {}
    name = name.strip() if isinstance(name, str) else name
    is_name = isinstance(name, str) and name and "\n" not in name
    if not is_name or not isinstance(arguments, dict) or not all(map(str.isidentifier, arguments)):
        raise BadRecordError(
            f"unsupported {field}",
            f"{place} calls {name!r:.40} with {arguments!r:.80}: expected the name of a tool, and "
            "an object of named arguments",
        )
    call = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "call": call}


def read_text(content: Any, place: str) -> str:
    """Return a text, or the text of a list of parts that are all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = type(content).__name__
        raise BadRecordError("wrong type", f"{place} holds {kind}, not text")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise BadRecordError("unsupported content", f"{place} has a part of type {kind!r:.40}")
    return "".join(part["text"] for part in content)


def parse_json(value: Any, field: str, place: str) -> Any:
    """Return a JSON value, which may be spelled as a text; None for an empty text."""
    if not isinstance(value, str):
        return drop_nulls(value)
    try:
        parsed = json.loads(value) if value.strip() else None
        _check_depth(parsed)
        return parsed
    except (ValueError, RecursionError) as error:
        detail = f"{field} of {place} is not JSON ({error})"
        raise BadRecordError(f"unsupported {field}", detail) from None


def _check_depth(value: Any, depth: int = MAX_DEPTH) -> None:
    """Raise ValueError for what is nested deeper than readers let a record be."""
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError(f"more than {MAX_DEPTH} nested lists and objects")
        for child in value.values() if isinstance(value, dict) else value:
            _check_depth(child, depth - 1)


def said_fields(record: Record) -> Record:
    """Return the fields of a record or a turn that are not null."""
    return {name: value for name, value in record.items() if value is not None}


def drop_nulls(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return a value without the nulls in its objects, however deep."""
    if isinstance(value, dict) and depth:
        return {k: drop_nulls(v, depth - 1) for k, v in value.items() if v is not None}
    if isinstance(value, list) and depth:
        return [drop_nulls(v, depth - 1) for v in value]
    return value


def refuse(said: Mapping[str, Any], fields: Set[str], place: str) -> None:
    """Raise BadRecordError if one of the fields is filled."""
    if filled := next((name for name in said if name in fields and said[name]), None):
        detail = f"{place} has {filled}, which a message here cannot hold"
        raise BadRecordError(f"unsupported {filled}", detail)


def is_trained(said: Mapping[str, Any], place: str, in_turn: bool = False) -> bool:
    """Return what a record's or a turn's FLAGS say.

    Raises BadRecordError for a value that is neither yes nor no, and for another field that is
    about training. A record has columns named so for other reasons: only a yes or no, or a list of
    them, counts there.
    """
    trained = True
    for name, value in said.items():
        word = _find_training_word(name)
        if word in FLAGS:
            if isinstance(value, str):
                value = {"true": 1, "false": 0, "1": 1, "0": 0}.get(value.lower())
            if not isinstance(value, int | float) or value not in (0, 1):
                raise BadRecordError(
                    f"unsupported {name}",
                    f"{place} has {name} {said[name]!r:.40}: expected true or false, or 1 or 0",
                )
            trained = trained and bool(value) is FLAGS[word]
        elif name.lower() in BOOLEAN_FLAGS and isinstance(value, bool):
            trained = trained and value is BOOLEAN_FLAGS[name.lower()]
        elif word == "mask" or (word and (in_turn or isinstance(value, list) or value in (0, 1))):
            detail = f"{place} has {name} {value!r:.40}: expected loss, weight or train"
            raise BadRecordError(f"unsupported {name}", detail)
    return trained


@functools.lru_cache
def _find_training_word(name: str) -> str:
    """Return the name of a field that is about training, in the spelling of FLAGS, or ""."""
    word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return word if word in FLAGS or TRAINING_WORD.search(word) else ""


def without_loss(messages: Sequence[Message]) -> list[Message]:
    """Return messages none of whose answers is trained."""
    return [{**m, "loss": False} if m["role"] == "assistant" else m for m in messages]
