"""ChatGLM3's conversation format as token ids.

    [gMASK] sop <|user|> \\n question <|assistant|> \\n answer <|user|> ... answer </s>
    '---------- prompt, not trained -------------' '--- trained ---'

Every part is encoded separately, so each starts with the tokenizer's symbol for a space. No text
becomes a special token: a user who types "<|assistant|>" gets ordinary pieces. `tokenizer` is a
merged tokenizer in either form, sentencepiece's processor (tokenizer.load_processor) or the
AutoTokenizer of step 2's folder; both give the same ids.

messages.py shows the messages. Their tools are written as ChatGLM3's fine-tuning code writes
them (format_conversation in THUDM/ChatGLM3, finetune_chatmodel_demo/preprocess_utils.py), one call
at a time:

    <|system|> \\n Answer the following ... tools:\\n[{"name": "get_weather", ...}] <|user|> ...
    <|assistant|> get_weather\\n ```python\\ntool_call(city='Osaka')\\n``` <|observation|> \\n 21
"""

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from chatglm_ja.chatglm3.tokenizer import EOS_ID, SPECIAL_TOKENS, STOP_TOKENS
from chatglm_ja.errors import DataError
from chatglm_ja.messages import (
    IGNORE_INDEX,
    Message,
    check_surrogates,
    is_call,
    is_trained,
    write_json_text,
)

INPUT_PREFIX = ("[gMASK]", "sop")  # starts every ChatGLM3 input
ROLES = ("system", "user", "assistant", "observation")
# Roles of OpenAI's messages, and whose turns they are in ChatGLM3's format.
OTHER_ROLES = {"developer": "system", "tool": "observation", "function": "observation"}
# How ChatGLM3's own chat samples. Its top_k was transformers' default then.
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.8, "top_k": 50}

TOOLS_PROMPT = (
    "Answer the following questions as best as you can. You have access to the following tools:\n"
)


def special_id(tokenizer: Any, token: str) -> int:
    """Return the id of a special token. Raises DataError if the tokenizer does not have it."""
    if hasattr(tokenizer, "convert_tokens_to_ids"):  # transformers' form
        if token in tokenizer.get_added_vocab():
            return int(tokenizer.convert_tokens_to_ids(token))
    elif tokenizer.is_control(index := tokenizer.piece_to_id(token)):
        return int(index)
    raise DataError(f"the tokenizer has no special token {token}: expected one from step 2")


def first_new_id(tokenizer: Any) -> int:
    """Return the id of the first piece that step 2 added; it follows the base's special tokens."""
    return special_id(tokenizer, SPECIAL_TOKENS[-1]) + 1


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text without recognizing special tokens. Raises DataError for a lone surrogate."""
    check_surrogates(text)
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoding["input_ids"])
    return list(tokenizer.encode(text))


def prefix_ids(tokenizer: Any) -> list[int]:
    """Return the ids that start every input."""
    return [special_id(tokenizer, token) for token in INPUT_PREFIX]


def stop_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer."""
    return [special_id(tokenizer, token) for token in STOP_TOKENS]


def write_tools(tools: Any) -> str:
    """Write tools, a JSON value of any form, as the text of a system message."""
    return TOOLS_PROMPT + write_json_text(tools, indent=4)


def write_call(arguments: Mapping[str, Any]) -> str:
    """Write a call's arguments as the content of a message; its metadata is the tool's name."""
    keywords = [ast.keyword(name, ast.Constant(value)) for name, value in arguments.items()]
    return f"```python\n{ast.unparse(ast.Call(ast.Name('tool_call'), [], keywords))}\n```"


def write_message(message: Message) -> tuple[str, Any]:
    """Return the header and the text of a message, with its tools or its call written out."""
    header, text = message.get("metadata") or "", message.get("content")
    if call := message.get("call"):
        header, text = call["name"], write_call(call["arguments"])
    elif tools := message.get("tools"):
        text = f"{text}\n{write_json_text(tools, indent=4)}" if text else write_tools(tools)
    return header, text


def message_ids(tokenizer: Any, message: Message) -> list[int]:
    """Tokenize a message: its role's token, its header, its text.

    Raises DataError for an unknown role and for content that is not text.
    """
    role = message["role"]
    header, content = write_message(message)
    if role not in ROLES:
        raise DataError(f"role {role!r} does not exist: expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(
            f'a message has content of type {type(content).__name__}: expected text ("" for none)'
        )
    return [
        special_id(tokenizer, f"<|{role}|>"),
        *encode_text(tokenizer, header + "\n"),
        *encode_text(tokenizer, content),
    ]


def build_prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokenize a conversation that the assistant answers next."""
    parts = itertools.chain.from_iterable(message_ids(tokenizer, message) for message in messages)
    return [*prefix_ids(tokenizer), *parts, special_id(tokenizer, "<|assistant|>")]


def build_example(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return ids and labels, of equal length, of a conversation for training.

    Labels train the line break after <|assistant|>, which the model has to generate itself, the
    answer, and the token that ends it: the next role's, or after the last message </s>. A call is
    ended by <|observation|>, whether or not the observation follows.
    """
    ids = prefix_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    after_trained = ends_with_call = False
    for message in messages:
        role_token, *body = message_ids(tokenizer, message)
        labels.append(role_token if after_trained else IGNORE_INDEX)
        after_trained, ends_with_call = is_trained(message), is_call(message)
        labels += body if after_trained else [IGNORE_INDEX] * len(body)
        ids += [role_token, *body]
    end = special_id(tokenizer, "<|observation|>") if ends_with_call else EOS_ID
    ids.append(end)
    labels.append(end if after_trained else IGNORE_INDEX)
    return ids, labels
