"""Conversations through a base's own chat template, as ids and labels.

    <|im_start|>user\\n question<|im_end|>\\n<|im_start|>assistant\\n answer<|im_end|> ...
    '------------------- prompt, not trained -------------------' '---- trained ---'

A template is a program that writes a conversation as one text, so nothing in it says which part the
assistant wrote. An answer starts where the prompt of the messages before it ends: that prompt,
rendered on its own, is the beginning of the whole conversation. The text is tokenized in parts that
are cut there, so that the tokens before an answer are those of its prompt, which the model reads
when it answers. If a template writes its prompts otherwise, its {% generation %} tags are asked. An
answer ends with the first stop token in it.

What a template can do is found out when it is opened, by rendering short conversations and looking
for their words, as llama.cpp does (minja's capabilities): a template that knows no tools leaves
them out without a word, and the model would learn to answer observations that nothing asked for.

No text becomes a special token. A message that spells one gets a space after its first character,
because transformers reads the special tokens of a rendered conversation wherever they stand.
"""

import contextlib
import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from chatglm_ja.bases.interface import FormatError
from chatglm_ja.errors import DataError
from chatglm_ja.messages import IGNORE_INDEX, Message, check_surrogates, is_trained

# What a template is told that asks for the date, so that results do not depend on the day.
TODAY = datetime.datetime(2024, 7, 26)
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# The words of the conversations that a template is tried on; no template changes them.
_QUESTION, _ANSWER, _NEXT, _LAST = "oneprobe", "twoprobe", "threeprobe", "fourprobe"


@dataclass(frozen=True)
class _Chat:
    """A conversation as a template takes it: the turns, which of them are trained, the tools."""

    turns: list[dict[str, Any]]
    trained: list[bool]
    tools: list[Any] | None


class ChatTemplate:
    """The chat template of a tokenizer (PreTrainedTokenizerFast).

    stop_ids   the ids that end an answer: `eos_ids`, and those that the template ends turns with

    A conversation that the template leaves open is ended by the first of `eos_ids`. Raises
    DataError if there is no template, or none whose conversations can be split into parts.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special_ids = {index for index, token in added.items() if token.special}
        self._specials = [added[i].content for i in self._special_ids if len(added[i].content) > 1]
        self._any_special = re.compile("|".join(map(re.escape, self._specials)) or "(?!)")
        self.stop_ids = list(dict.fromkeys(eos_ids))
        self._end = self._call_end = self.stop_ids[0]  # of a conversation that is left open
        # Tokenizers made from sentencepiece begin every text with a space.
        self._adds_space = tokenizer.tokenize("x") != ["x"]
        self._has_tags = False  # the answers are found by the template's {% generation %} tags
        self._unwritten: set[str] = set()  # what the template leaves out
        self._text_beside_call = False  # a turn may hold both
        try:
            self._try_out()
        except FormatError as error:
            raise DataError(
                f"the chat template of {tokenizer.name_or_path} fails on a question and its answer "
                f"({error.detail}): correct it, or prepare no conversations (--sft-examples 0)"
            ) from None

    def build_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokenize a conversation that the assistant answers next. Raises FormatError."""
        return self._split(self._translate(messages), is_prompt=True)[0]

    def build_example(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return ids and labels, of equal length, of a conversation for training.

        Labels train the answers, calls among them, with the tokens that end them. The ids end with
        the last trained one, because no loss depends on those that a template writes after it.
        Raises FormatError.
        """
        chat = self._translate(messages)
        ids, starts = self._split(chat)
        last = len(chat.turns) - 1
        if last in starts and not any(index in self.stop_ids for index in ids[starts[last] :]):
            ids.append(self._call_end if "tool_calls" in chat.turns[last] else self._end)
        labels = [IGNORE_INDEX] * len(ids)
        end = len(ids)
        for turn in itertools.compress(range(len(chat.turns)), chat.trained):
            start, end = self._find_answer(turn, ids, starts)
            labels[start:end] = ids[start:end]
        return ids[:end], labels[:end]

    def _find_answer(
        self, turn: int, ids: Sequence[int], starts: Mapping[int, int]
    ) -> tuple[int, int]:
        """Return where the answer of a turn starts and ends, its stop token included.

        Raises FormatError if it cannot be told from what is around it.
        """
        if turn not in starts:
            raise _cannot_split(f"it does not begin with the prompt of turn {turn + 1}")
        start = starts[turn]
        bound = min((place for place in starts.values() if place > start), default=len(ids))
        for place in range(start, bound):
            if ids[place] in self.stop_ids:
                return start, place + 1
        if turn + 1 not in starts:
            raise _cannot_split(f"no token ends the answer that is turn {turn + 1}")
        return start, bound  # the header of the call that follows ends the text that announces it

    def _split(self, chat: _Chat, is_prompt: bool = False) -> tuple[list[int], dict[int, int]]:
        """Return the ids of a conversation, and the first token of every answer, by its turn.

        Answers that cannot be told from what is before them are left out.
        """
        answers = [i for i, turn in enumerate(chat.turns) if turn["role"] == "assistant"]
        if self._has_tags and not is_prompt:
            return self._split_by_tags(chat, answers)
        text = self._render(chat.turns, chat.tools, is_prompt)
        cuts: dict[int, int] = {}
        for turn in [] if self._has_tags else answers:
            prompt = self._render(chat.turns[:turn], chat.tools, is_prompt=True)
            if text.startswith(prompt) and len(prompt) >= max(cuts.values(), default=0):
                cuts[turn] = len(prompt)
        if self._adds_space:
            ids = self._encode(text)
            prompts = {turn: self._encode(text[:cut]) for turn, cut in cuts.items()}
            return ids, {t: len(part) for t, part in prompts.items() if ids[: len(part)] == part}
        edges = itertools.pairwise([0, *cuts.values(), len(text)])
        parts = [self._encode(text[start:end]) for start, end in edges]
        lengths = itertools.accumulate(map(len, parts))
        return list(itertools.chain(*parts)), dict(zip(cuts, lengths, strict=False))

    def _split_by_tags(
        self, chat: _Chat, answers: Sequence[int]
    ) -> tuple[list[int], dict[int, int]]:
        """Return what `_split` does, from the beginnings of the {% generation %} blocks."""
        encoding = self._apply(
            chat.turns, chat.tools, return_assistant_tokens_mask=True, return_dict=True
        )
        marks = itertools.pairwise([0, *encoding["assistant_masks"]])
        starts = [place for place, pair in enumerate(marks) if pair == (0, 1)]
        if len(starts) != len(answers):
            raise _cannot_split(f"{len(answers)} answers, {len(starts)} generation blocks")
        return list(encoding["input_ids"]), dict(zip(answers, starts, strict=True))

    def _render(
        self, turns: Sequence[Mapping[str, Any]], tools: Any, is_prompt: bool = False
    ) -> str:
        return str(self._apply(turns, tools, add_generation_prompt=is_prompt, tokenize=False))

    def _apply(self, turns: Sequence[Mapping[str, Any]], tools: Any, **options: Any) -> Any:
        """Apply the template. Raises FormatError with its words for what it refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=tools, strftime_now=TODAY.strftime, **options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise FormatError("refused by the chat template", str(error)) from None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _translate(self, messages: Sequence[Message]) -> _Chat:
        """Return messages as the template takes them. Raises FormatError for what it leaves out."""
        chat = _Chat([], [], None)
        tools: list[Any] = []
        call: dict[str, Any] | None = None  # the last one
        for message in messages:
            kind, turn = message["role"], _turn(message["role"], self._plain(message["content"]))
            if message.get("metadata"):
                raise FormatError(
                    "unsupported metadata",
                    "a message is in ChatGLM3's own form: expected tools and calls as in OpenAI's",
                )
            if kind == "system":
                tools += self._translate_tools(message.get("tools"))
                if not turn["content"]:
                    continue
            elif message.get("call"):
                kind, call = "call", _tool_call(self._plain(message["call"]), len(chat.turns))
                turn["tool_calls"] = [call]
            elif kind == "observation":
                turn = _turn("tool", turn["content"], call)
            self._refuse_unwritten(kind)
            self._add(chat, turn, is_trained(message))
        return _Chat(chat.turns, chat.trained, tools or None)

    def _add(self, chat: _Chat, turn: dict[str, Any], is_trained: bool) -> None:
        """Add a turn; a call joins the text that announces it, if the template writes both."""
        before = chat.turns[-1] if chat.turns else {}
        announces = before.get("role") == "assistant" and "tool_calls" not in before
        joins = announces and "tool_calls" in turn and chat.trained[-1] == is_trained
        if joins and self._text_beside_call:
            before["tool_calls"] = turn["tool_calls"]
        else:
            chat.turns.append(turn)
            chat.trained.append(is_trained)

    def _translate_tools(self, tools: Any) -> list[Any]:
        """Return a system message's tools in OpenAI's form, which templates are written for."""
        if not tools:
            return []
        listed = [tools] if isinstance(tools, dict) else tools
        if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
            raise FormatError("unsupported tools", "expected a list of tools, each an object")
        self._refuse_unwritten("tools")
        return [
            self._plain(tool if "function" in tool else {"type": "function", "function": tool})
            for tool in listed
        ]

    def _refuse_unwritten(self, kind: str) -> None:
        if kind in self._unwritten:
            raise FormatError(f"unsupported {kind}", f"the base's chat template writes no {kind}")

    def _plain(self, value: Any) -> Any:
        """Return a text or a JSON value in which no special token is spelled.

        What JSON does not have, such as a date, becomes a string. Raises DataError for a lone
        surrogate.
        """
        if isinstance(value, str):
            check_surrogates(value)
            return self._break_specials(value)
        if isinstance(value, Mapping):
            return {self._plain(name): self._plain(item) for name, item in value.items()}
        if isinstance(value, list):
            return list(map(self._plain, value))
        return value if isinstance(value, int | float | None) else self._plain(str(value))

    def _break_specials(self, text: str) -> str:
        if self._any_special.search(text):
            for token in self._specials:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _try_out(self) -> None:
        """Find out what the template can do.

        Raises DataError for one that cannot be used, and FormatError with its own words.
        """
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{name} has no chat template: put a chat_template.jinja into the folder of the "
                "base, or prepare no conversations (--sft-examples 0)"
            )
        talk = [
            _turn("user", _QUESTION), _turn("assistant", _ANSWER),
            _turn("user", _NEXT), _turn("assistant", _LAST),
        ]  # fmt: skip
        chat = _Chat(talk, [False, True] * 2, None)
        template = self.tokenizer.get_chat_template()
        is_split = len(self._split(chat)[1]) == 2
        self._has_tags = not is_split and GENERATION_TAG.search(template) is not None
        try:
            ids, starts = self._split(chat)
            self._learn_end(talk)
            self._find_answer(1, ids, starts)
        except FormatError as error:
            raise DataError(
                f"{name} has a chat template that cannot be split into parts ({error.detail}): "
                "mark the answers in it with {% generation %} tags, and end each with eos_token"
            ) from None
        self._learn_tools()

    def _learn_tools(self) -> None:
        """Find out which of system texts, tools and calls the template writes."""
        user = _turn("user", _QUESTION)
        call = _tool_call({"name": "toolprobe", "arguments": {"value": _ANSWER}}, 0)
        calling = {**_turn("assistant", ""), "tool_calls": [call]}
        observed = [user, calling, _turn("tool", _NEXT, call)]
        function = {"name": _LAST, "description": "", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": function}]
        tries: dict[str, tuple[str, list[Any], Any]] = {
            "system": (_NEXT, [_turn("system", _NEXT), user], None),
            "tools": (_LAST, [user], tools),
            "call": (_ANSWER, [user, calling], None),
            "observation": (_NEXT, observed, None),
        }
        self._unwritten = {kind for kind, given in tries.items() if self._omits(*given)}
        self._text_beside_call = not self._omits(_LAST, [user, {**calling, "content": _LAST}])
        with contextlib.suppress(FormatError):
            self._call_end = self._learn_end(observed)

    def _omits(self, word: str, turns: Sequence[Any], tools: Any = None) -> bool:
        """Return whether the template leaves a word out without refusing the conversation."""
        with contextlib.suppress(FormatError):
            return word not in self._render(turns, tools)
        return False

    def _learn_end(self, turns: Sequence[Any]) -> int:
        """Return the token that ends the answer _ANSWER, before the turn _NEXT.

        It is one of `stop_ids`, or else the first special token, which becomes one of them. Raises
        FormatError if there is none.
        """
        text = self._render(turns, None)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first, last = text.find(_ANSWER), text.find(_NEXT)
        between = [
            index
            for index, (start, _) in zip(
                encoding["input_ids"], encoding["offset_mapping"], strict=True
            )
            if first < start < last and index in self._special_ids
        ]
        ends = [*(index for index in between if index in self.stop_ids), *between]
        if not ends:
            raise _cannot_split("no special token ends an answer")
        if ends[0] not in self.stop_ids:
            self.stop_ids.append(ends[0])
        return ends[0]


def _turn(role: str, content: str, call: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a turn; that of a tool says which call it answers."""
    answered = {"name": call["function"]["name"], "tool_call_id": call["id"]} if call else {}
    return {"role": role, "content": content, **answered}


def _tool_call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a call in OpenAI's form. Mistral's templates want ids of nine letters and digits."""
    return {"id": f"{number:09d}", "type": "function", "function": call}


def _cannot_split(detail: str) -> FormatError:
    return FormatError("not split by the chat template", detail)
