"""A chat with a model: prompts that fit its window, answers streamed, and the terminal chat.

What the user types is text only: it never becomes a special token. When a conversation outgrows the
model's window, its oldest exchanges are left out of the prompt.
"""

import bisect
import io
import readline  # noqa: F401  gives input() line editing and a history
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

from chatglm_ja.bases.interface import FormatError, ModelTokenizer
from chatglm_ja.data import cleaning, conversations
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import ChatOptions
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.messages import Message

NO_ANSWER = "(no answer)"  # shown for an answer without text
CLEAR, EXIT = "/clear", "/exit"


def stream_reply(
    model: LoadedModel, messages: Sequence[Message], options: ChatOptions
) -> Generator[str]:
    """Stream the answer to the last message, the user's, which is cleaned, as pieces of text.

    The answer gets `max_new_tokens` of the model's window, but at most half of it. Raises DataError
    if the last message alone is too long for the rest.
    """
    *before, question = messages
    text = cleaning.clean(question["content"], options.unicode_form)
    messages = [*before, {**question, "content": text}]
    options = replace(options, max_new_tokens=min(options.max_new_tokens, model.window // 2))
    prompt = build_fitting_prompt(model.tokenizer, messages, model.window - options.max_new_tokens)
    return generation.stream_answer(model, prompt, options)


def build_fitting_prompt(
    tokenizer: ModelTokenizer, messages: Sequence[Message], size: int
) -> list[int]:
    """Return the ids of a prompt of at most `size` tokens, without the oldest exchanges if needed.

    Raises DataError if the last exchange alone is longer, and for what the base's format cannot
    express.
    """
    build, rests = tokenizer.build_prompt, conversations.shorten(messages)
    try:
        longest = bisect.bisect_left(rests, True, key=lambda rest: len(build(rest)) <= size)
        prompt = build(rests[min(longest, len(rests) - 1)])
    except FormatError as error:
        raise DataError(f"{error.reason}: {error.detail}") from None
    if longest == len(rests):
        length = len(tokenizer.encode(messages[-1]["content"]))
        room = max(0, size - (len(prompt) - length))
        raise DataError(f"the message has {length:,} tokens, expected at most {room:,}: shorten it")
    return prompt


def chat_in_terminal(model: LoadedModel, options: ChatOptions) -> None:
    """Chat until the end of the input or /exit; Ctrl-C stops an answer, or at the prompt the chat.

    Raises ConfigError if standard input is closed.
    """
    if sys.stdin is None:
        raise ConfigError("--chat reads what you type, and standard input is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may lack characters of the answer
        sys.stdout.reconfigure(errors="replace")
    messages: list[Message] = []
    print(f"{CLEAR} starts a new conversation, {EXIT} or Ctrl-D ends, Ctrl-C stops an answer")
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
            continue
        if not text:
            continue
        question, answer = {"role": "user", "content": text}, ""
        try:
            with closing(stream_reply(model, [*messages, question], options)) as pieces:
                for piece in pieces:
                    answer += piece
                    print(piece, end="", flush=True)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(" …", end="")
        print(end="\n" if answer else f"{NO_ANSWER}\n")
        messages += [question, {"role": "assistant", "content": answer}]
