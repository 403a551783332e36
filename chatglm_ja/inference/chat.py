"""A dialogue with a model: the prompt that fits its window, and its answer as it is written.

What the user types is text only: it never becomes one of ChatGLM3's special tokens. When a
dialogue outgrows the model's window, its oldest exchanges are left out.
"""

import io
import readline  # noqa: F401  input() with editing and history
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.data import conversations
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import Sampling

Message = conversations.Message


@dataclass(frozen=True)
class ChatOptions:
    """How a chat answers: sampling, the longest answer in tokens, and its time limit in seconds."""

    sampling: Sampling
    max_new_tokens: int
    seconds: float | None = None


NO_ANSWER = "(no answer)"  # shown for an answer without text


def stream_reply(
    model: Any,
    encoder: Any,
    messages: Sequence[Message],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    seconds: float | None = None,
) -> Generator[str]:
    """The pieces of the answer to the last of the messages, which is the user's.

    The answer gets `max_new_tokens` of the model's window, but at most half of it. Raises DataError
    if the last message alone is too long for the rest.
    """
    window = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, window // 2)
    prompt = build_fitting_prompt(encoder, messages, window - max_new_tokens)
    return generation.stream_answer(
        model, encoder, prompt, max_new_tokens, sampling=sampling, seconds=seconds
    )


def build_fitting_prompt(encoder: Any, messages: Sequence[Message], room: int) -> list[int]:
    """The ids of a prompt of at most `room` tokens, without the oldest exchanges if need be."""
    lengths = [len(chat_format.message_ids(encoder, message)) for message in messages]
    room -= len(chat_format.build_prompt_ids(encoder, []))
    dropped = conversations.last_exchanges(messages, lengths, room)
    if dropped == len(messages):
        raise DataError(
            f"the message has {lengths[-1]:,} tokens, and there is room for {room:,}: shorten it"
        )
    system = messages[: messages[0]["role"] == "system"]
    return chat_format.build_prompt_ids(encoder, [*system, *messages[len(system) + dropped :]])


CLEAR, EXIT = "/clear", "/exit"


def chat_in_terminal(model: Any, encoder: Any, max_new_tokens: int, sampling: Sampling) -> None:
    """Until the end of the input, or /exit. Ctrl-C ends the answer at hand, or the talk.

    Raises ConfigError without an input.
    """
    if sys.stdin is None:
        raise ConfigError("--chat reads what you type, and standard input is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack letters of the answer
        sys.stdout.reconfigure(errors="replace")
    messages: list[Message] = []
    print(f"{CLEAR} forgets what was said, {EXIT} or Ctrl-D ends, Ctrl-C stops an answer")
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == EXIT:
            return
        if text == CLEAR:
            messages = []
        elif text:
            messages = _exchange(model, encoder, messages, text, max_new_tokens, sampling)


def _exchange(
    model: Any,
    encoder: Any,
    before: list[Message],
    text: str,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Message]:
    """The messages with the question and its answer, which is printed; as before if it fails."""
    messages = [*before, {"role": "user", "content": text}]
    answer = ""
    try:
        pieces = stream_reply(model, encoder, messages, max_new_tokens, sampling=sampling)
        with closing(pieces):
            for piece in pieces:
                answer += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return before
    except KeyboardInterrupt:
        sys.stdout.write(" …")
    print(end="\n" if answer else f"{NO_ANSWER}\n")
    return [*messages, {"role": "assistant", "content": answer}]
