"""The messages of a conversation, as every room passes them on.

A message is a mapping:

    role        system, user, assistant or observation (what a tool returned)
    content     its text
    tools       of a system message: the tools that the assistant may call, a JSON value
    call        of an assistant message: {"name": ..., "arguments": {...}}, a tool that it calls
    metadata    of a message that is in ChatGLM3's form already: its header
    loss        false for an answer that is context only: none of its tokens is trained
"""

import json
from collections.abc import Mapping
from typing import Any

from chatglm_ja.errors import DataError

Message = Mapping[str, Any]
IGNORE_INDEX = -100  # label of a token that is not trained
TEXT_PARTS = ("text", "input_text", "output_text")  # types of the parts of a content that are text


def is_call(message: Message) -> bool:
    """Return whether a message is the assistant's call of a tool."""
    return message["role"] == "assistant" and bool(message.get("call") or message.get("metadata"))


def is_trained(message: Message) -> bool:
    """Return whether a message is an answer, or a call, that the loss is computed on."""
    return message["role"] == "assistant" and bool(message.get("loss", True))


def write_json_text(value: Any, indent: int | None = None) -> str:
    """Write a value as JSON; what JSON does not have, such as a date, as a string."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


def check_surrogates(text: str) -> None:
    """Raise DataError for a text with a lone surrogate, which has no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a message holds the lone surrogate {text[error.start]!r} at character {error.start}: "
            "fix or remove it"
        ) from None
