"""A conversation with a model: prompts that fit its window, answers streamed, the terminal chat.

What the user types is text only: it never becomes a special token. When a conversation outgrows the
model's window, its oldest exchanges are left out of the prompt.
"""

import bisect
import io
import readline  # noqa: F401  gives input() line editing and a history
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from chatglm_ja.bases.interface import FormatError, ModelTokenizer
from chatglm_ja.data import cleaning, conversations
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import ChatOptions, Reply
from chatglm_ja.inference.models import LoadedModel, Stage
from chatglm_ja.messages import Message

NO_ANSWER = "(no answer)"  # shown for an answer without text
CUT = "…"  # shown after an answer that did not end by itself
CONTINUE, CLEAR, EXIT = "/continue", "/clear", "/exit"
NOT_BEGUN = Reply("", 0, stopped=False)


@dataclass
class Exchange:
    """A question and its answer so far, which can be continued until it is `stopped`."""

    question: str
    answer: Reply = NOT_BEGUN


def load_model(stage: Stage) -> LoadedModel:
    """Check and load a stage's model. Raises DataError if its base has no format of chats."""
    stage.open()
    model = stage.load()
    if not model.tokenizer.has_chat_format:
        raise DataError(
            f"{stage.folder} has no chat template that can be used: put a chat_template.jinja into "
            "the folder, or chat with a model that was made for it"
        )
    return model


def stream_answer(
    model: LoadedModel, exchanges: Sequence[Exchange], options: ChatOptions
) -> Generator[None]:
    """Write or continue the last exchange's answer; yield whenever it has grown.

    Questions are cleaned as the training data was. The answer gets `max_new_tokens` more of the
    model's window, in all at most half of it. Closing the generator stops the model; the exchange
    keeps what was answered. Raises DataError if the answer or its question is too long for that.
    """
    messages: list[Message] = []
    for exchange in exchanges:
        question = cleaning.clean(exchange.question, options.unicode_form)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": exchange.answer.text})
    last = exchanges[-1]
    begun = last.answer.ids
    longest = model.window // 2
    count = min(options.max_new_tokens, longest - len(begun))
    if count <= 0:
        raise DataError(
            f"the answer has {len(begun):,} tokens, expected fewer than {longest:,}, half of the "
            "model's window: ask for the rest in a new question"
        )
    prompt = build_fitting_prompt(model.tokenizer, messages[:-1], model.window - len(begun) - count)
    options = replace(options, max_new_tokens=count)
    return _keep_answer(last, generation.stream_answer(model, prompt, options, begun))


def _keep_answer(exchange: Exchange, replies: Generator[Reply]) -> Generator[None]:
    with closing(replies):
        for reply in replies:
            exchange.answer = reply
            yield


def build_fitting_prompt(
    tokenizer: ModelTokenizer, messages: Sequence[Message], size: int
) -> list[int]:
    """Return the ids of a prompt of at most `size` tokens, without the oldest exchanges if needed.

    Raises DataError if the last question alone is longer, and for what the base's format cannot
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


def chat_in_terminal(model: LoadedModel, name: str, options: ChatOptions) -> None:
    """Chat until the end of the input or /exit; Ctrl-C stops an answer, or at the prompt the chat.

    `name` is what the model is called. Raises ConfigError if standard input is closed.
    """
    if sys.stdin is None:
        raise ConfigError("--chat reads what you type, and standard input is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may lack characters of the answer
        sys.stdout.reconfigure(errors="replace")
    exchanges: list[Exchange] = []
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
            exchanges = []
        elif text == CONTINUE:
            if exchanges and not exchanges[-1].answer.stopped:
                _print_answer(model, name, exchanges, options)
            else:
                print("no answer was cut")
        elif text:
            exchanges.append(Exchange(text))
            _print_answer(model, name, exchanges, options)


def _print_answer(
    model: LoadedModel, name: str, exchanges: list[Exchange], options: ChatOptions
) -> None:
    """Print the last answer, or what continues it, until it ends or Ctrl-C stops it.

    A question that cannot be answered is taken out of the exchanges.
    """
    last = exchanges[-1]
    shown = len(last.answer.text)
    try:
        with closing(stream_answer(model, exchanges, options)) as growth:
            print(f"{name}> ", end="", flush=True)
            for _ in growth:
                print(last.answer.text[shown:], end="", flush=True)
                shown = len(last.answer.text)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        if not last.answer.ids:
            exchanges.pop()
        return
    except KeyboardInterrupt:
        pass
    print("" if last.answer.text else NO_ANSWER, end="\n" if last.answer.stopped else f" {CUT}\n")
