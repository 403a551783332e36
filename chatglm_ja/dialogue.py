"""A dialogue with a model: the prompt that fits its window, and its answer as it is written.

What the user types is text only: it never becomes one of ChatGLM3's special tokens. When a
dialogue outgrows the model's window, its oldest exchanges are left out.
"""

from collections.abc import Generator, Sequence
from typing import Any

from chatglm_ja import chat, conversations, generation
from chatglm_ja.errors import DataError
from chatglm_ja.generation import Sampling

Message = conversations.Message

NO_ANSWER = "(no answer)"  # shown for an answer without text


def reply(
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
    prompt = fitting_prompt(encoder, messages, window - max_new_tokens)
    return generation.stream(
        model, encoder, prompt, max_new_tokens, sampling=sampling, seconds=seconds
    )


def fitting_prompt(encoder: Any, messages: Sequence[Message], room: int) -> list[int]:
    """The ids of a prompt of at most `room` tokens, without the oldest exchanges if need be."""
    lengths = [len(chat.message_ids(encoder, message)) for message in messages]
    room -= len(chat.build_prompt_ids(encoder, []))
    dropped = conversations.last_exchanges(messages, lengths, room)
    if dropped == len(messages):
        raise DataError(
            f"the message has {lengths[-1]:,} tokens, and there is room for {room:,}: shorten it"
        )
    system = messages[: messages[0]["role"] == "system"]
    return chat.build_prompt_ids(encoder, [*system, *messages[len(system) + dropped :]])
