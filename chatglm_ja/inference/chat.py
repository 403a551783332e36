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
from chatglm_ja.inference.generation import Answer, ChatOptions
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.messages import IGNORE_INDEX, Message

NO_ANSWER = "(no answer)"  # shown for an answer without text
CUT = "…"  # shown after an answer that did not end by itself
CONTINUE, CLEAR, EXIT = "/continue", "/clear", "/exit"


def stream_reply(
    model: LoadedModel, messages: Sequence[Message], options: ChatOptions
) -> Generator[Answer]:
    """Stream the answer to the last message, the user's, as generation.stream_answer does.

    If the last message is an answer, it is continued. What the user wrote is cleaned. The answer
    gets `max_new_tokens` of the model's window, but at most half of it. Raises DataError if the
    last exchange alone is too long for the rest.
    """
    messages = [
        {**message, "content": cleaning.clean(message["content"], options.unicode_form)}
        if message["role"] == "user"
        else message
        for message in messages
    ]
    options = replace(options, max_new_tokens=min(options.max_new_tokens, model.window // 2))
    size = model.window - options.max_new_tokens
    prompt, begun = build_fitting_prompt(model.tokenizer, messages, size)
    return generation.stream_answer(model, prompt, options, begun)


def build_fitting_prompt(
    tokenizer: ModelTokenizer, messages: Sequence[Message], size: int
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and of the answer so far, without the oldest exchanges if needed.

    Together they have at most `size` tokens. Raises DataError if the last exchange alone is longer,
    and for what the base's format cannot express.
    """
    rests = conversations.shorten(messages)
    try:
        longest = bisect.bisect_left(
            rests, True, key=lambda rest: sum(map(len, _build_ids(tokenizer, rest))) <= size
        )
        prompt, begun = _build_ids(tokenizer, rests[min(longest, len(rests) - 1)])
    except FormatError as error:
        raise DataError(f"{error.reason}: {error.detail}") from None
    if longest < len(rests):
        return prompt, begun
    if begun:
        raise DataError(
            f"the question and its answer have {len(prompt) + len(begun):,} tokens, a continued "
            f"answer may have {size:,}: ask for shorter answers, or in parts"
        )
    length = len(tokenizer.encode(messages[-1]["content"]))
    room = max(0, size - (len(prompt) - length))
    raise DataError(f"the message has {length:,} tokens, expected at most {room:,}: shorten it")


def _build_ids(
    tokenizer: ModelTokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Return the ids up to the last answer, and those of the answer without the token that ends it.

    The latter are none if the last message is the user's.
    """
    if messages[-1]["role"] == "user":
        return tokenizer.build_prompt(messages), []
    ids, labels = tokenizer.build_example(messages)
    trained = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    end = start = trained[-1]
    while labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return ids[:start], ids[start:end]


def chat_in_terminal(model: LoadedModel, name: str, options: ChatOptions) -> None:
    """Chat until the end of the input or /exit; Ctrl-C stops an answer, or at the prompt the chat.

    `name` is what the model is called. Raises ConfigError if standard input is closed.
    """
    if sys.stdin is None:
        raise ConfigError("--chat reads what you type, and standard input is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may lack characters of the answer
        sys.stdout.reconfigure(errors="replace")
    messages: list[Message] = []
    print(
        f"{CONTINUE} continues an answer that was cut ({CUT}), {CLEAR} starts a new conversation, "
        f"{EXIT} or Ctrl-D ends, Ctrl-C stops an answer"
    )
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
        if not text or (text == CONTINUE and not messages):
            continue
        answer = Answer("", 0, stopped=False)
        if text == CONTINUE:
            *asked, last = messages
            answer = replace(answer, text=last["content"])
        else:
            asked = [*messages, {"role": "user", "content": text}]
        begun = [{"role": "assistant", "content": answer.text}] if answer.text else []
        shown = len(answer.text)
        try:
            with closing(stream_reply(model, [*asked, *begun], options)) as answers:
                print(f"{name}> ", end="", flush=True)
                for answer in answers:
                    print(answer.text[shown:], end="", flush=True)
                    shown = len(answer.text)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            pass
        print("" if answer.text else NO_ANSWER, end="\n" if answer.stopped else f" {CUT}\n")
        messages = [*asked, {"role": "assistant", "content": answer.text}]
