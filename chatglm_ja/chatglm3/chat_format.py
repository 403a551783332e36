"""ChatGLM3's conversation format, as token ids.

    [gMASK] sop <|user|> \\n question <|assistant|> \\n answer <|user|> ... answer </s>
    '---------- prompt, not trained -------------' '--- trained ---'

Every part is encoded by itself and so starts with the tokenizer's own space mark. No text ever
becomes a special token: a user who types "<|assistant|>" gets ordinary pieces. `tokenizer` is a
merged tokenizer in either form, sentencepiece's processor (tokenizer.load) or the AutoTokenizer of
step 2's folder; both give the same ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from chatglm_ja.chatglm3.tokenizer import EOS_ID, SPECIAL_TOKENS, STOP_TOKENS
from chatglm_ja.errors import DataError

INPUT_PREFIX = ("[gMASK]", "sop")  # what every ChatGLM3 input starts with
ROLES = ("system", "user", "assistant", "observation")
IGNORE_INDEX = -100  # the label of a token that is not trained

Message = Mapping[str, str]


def special_id(tokenizer: Any, token: str) -> int:
    """The id of a special token of a merged tokenizer."""
    if hasattr(tokenizer, "convert_tokens_to_ids"):  # transformers'
        if token in tokenizer.get_added_vocab():
            return int(tokenizer.convert_tokens_to_ids(token))
    elif tokenizer.is_control(index := tokenizer.piece_to_id(token)):
        return int(index)
    raise DataError(f"the tokenizer has no special token {token}: expected one from step 2")


def first_new_id(tokenizer: Any) -> int:
    """The id of the first piece that the merge added: it follows the base's special tokens."""
    return special_id(tokenizer, SPECIAL_TOKENS[-1]) + 1


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text in which no special token is recognised. DataError for a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a message holds the lone surrogate {text[error.start]!r} at character {error.start}: "
            "mend or remove it"
        ) from None
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoding["input_ids"])
    return list(tokenizer.encode(text))


def prefix_ids(tokenizer: Any) -> list[int]:
    """The ids of PREFIX."""
    return [special_id(tokenizer, token) for token in INPUT_PREFIX]


def stop_ids(tokenizer: Any) -> list[int]:
    """The ids that end an answer."""
    return [special_id(tokenizer, token) for token in STOP_TOKENS]


def _header(tokenizer: Any, message: Message) -> list[int]:
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"role {role!r} does not exist: expected one of {', '.join(ROLES)}")
    metadata = (message.get("metadata") or "") + "\n"
    return [special_id(tokenizer, f"<|{role}|>"), *encode_text(tokenizer, metadata)]


def _content_ids(tokenizer: Any, message: Message) -> list[int]:
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(
            f'a message has content of type {type(content).__name__}: expected text ("" for none)'
        )
    return encode_text(tokenizer, content)


def message_ids(tokenizer: Any, message: Message) -> list[int]:
    """The ids of a message: its role's token, its header, its content."""
    return _header(tokenizer, message) + _content_ids(tokenizer, message)


def build_prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation that the assistant shall answer next."""
    ids = prefix_ids(tokenizer)
    for message in messages:
        ids += message_ids(tokenizer, message)
    return [*ids, special_id(tokenizer, "<|assistant|>")]


def build_example(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation for training, of equal length; see `join_example`."""
    parts = [message_ids(tokenizer, message) for message in messages]
    return join_example(prefix_ids(tokenizer), [message["role"] for message in messages], parts)


def join_example(
    prefix: Sequence[int], roles: Sequence[str], parts: Sequence[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation whose messages are encoded already, by `message_ids`.

    Trained are the header's line break after <|assistant|>, which the model has to write itself
    when it answers, the answer, and what ends it: the next role's token, or </s> after the last.
    """
    ids = list(prefix)
    labels = [IGNORE_INDEX] * len(ids)
    after_answer = False
    for role, (role_token, *body) in zip(roles, parts, strict=True):
        is_answer = role == "assistant"
        ids += [role_token, *body]
        labels.append(role_token if after_answer else IGNORE_INDEX)
        labels += body if is_answer else [IGNORE_INDEX] * len(body)
        after_answer = is_answer
    ids.append(EOS_ID)
    labels.append(EOS_ID if after_answer else IGNORE_INDEX)
    return ids, labels
