"""Talking to a model in the terminal: answers appear as they are written, turn after turn."""

import io
import readline  # noqa: F401  input() with editing and history
import sys
from contextlib import closing
from typing import Any

from chatglm_ja import dialogue
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.generation import Sampling

CLEAR, EXIT = "/clear", "/exit"


def talk(model: Any, encoder: Any, max_new_tokens: int, sampling: Sampling) -> None:
    """Until the end of the input, or /exit. Ctrl-C ends the answer at hand, or the talk.

    Raises ConfigError without an input.
    """
    if sys.stdin is None:
        raise ConfigError("--chat reads what you type, and standard input is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack letters of the answer
        sys.stdout.reconfigure(errors="replace")
    messages: list[dialogue.Message] = []
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
    before: list[dialogue.Message],
    text: str,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[dialogue.Message]:
    """The messages with the question and its answer, which is printed; as before if it fails."""
    messages = [*before, {"role": "user", "content": text}]
    answer = ""
    try:
        pieces = dialogue.reply(model, encoder, messages, max_new_tokens, sampling=sampling)
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
    print(end="\n" if answer else f"{dialogue.NO_ANSWER}\n")
    return [*messages, {"role": "assistant", "content": answer}]
