"""Chats: the prompt fits the window, and nothing typed becomes a special token."""

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from chatglm_ja.bases.interface import FormatError
from chatglm_ja.errors import DataError
from chatglm_ja.inference import chat, generation
from chatglm_ja.inference.generation import GREEDY, ChatOptions
from chatglm_ja.inference.models import LoadedModel


def make_messages(*texts: str) -> list[chat.Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def test_the_oldest_exchanges_are_left_out(model: LoadedModel) -> None:
    messages = make_messages("一", "二", "三", "四", "五")
    whole = model.tokenizer.build_prompt(messages)
    assert chat.build_fitting_prompt(model.tokenizer, messages, len(whole)) == whole
    short = model.tokenizer.build_prompt(messages[2:])
    assert chat.build_fitting_prompt(model.tokenizer, messages, len(whole) - 1) == short
    last = model.tokenizer.build_prompt(messages[4:])
    assert chat.build_fitting_prompt(model.tokenizer, messages, len(last)) == last
    system: list[chat.Message] = [{"role": "system", "content": "s"}]
    short = model.tokenizer.build_prompt([*system, *messages[4:]])
    assert chat.build_fitting_prompt(model.tokenizer, [*system, *messages], len(short)) == short
    with pytest.raises(DataError, match=r"the message has .* tokens, expected at most"):
        chat.build_fitting_prompt(model.tokenizer, messages, len(last) - 1)


def test_a_message_too_long_for_the_model_is_an_error(model: LoadedModel) -> None:
    limit = model.window
    around = len(model.tokenizer.build_prompt(make_messages("")))
    with pytest.raises(DataError, match=rf"expected at most {limit - 10 - around}: shorten it"):
        chat.stream_reply(model, make_messages("长" * limit), ChatOptions(GREEDY, 10))
    # Half of the window stays for the conversation, however long the answer may become.
    assert list(chat.stream_reply(model, make_messages("长"), ChatOptions(GREEDY, 10 * limit)))


def test_what_the_format_cannot_express_is_an_error(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Any, _messages: Any) -> None:
        raise FormatError("refused by the chat template", "roles must alternate")

    monkeypatch.setattr(type(model.tokenizer), "build_prompt", refuse)
    with pytest.raises(DataError, match="refused by the chat template: roles must alternate"):
        chat.stream_reply(model, make_messages("一"), ChatOptions(GREEDY, 4))


def test_a_question_is_cleaned_as_texts_are(model: LoadedModel) -> None:
    """A decomposed question, as some keyboards and pasted file names give it, is composed."""
    options = ChatOptions(GREEDY, 6)
    dirty, clean = "\ufeffか\u3099は\u3099\u200bな \r\n", "がばな"
    answers = [
        "".join(chat.stream_reply(model, make_messages("一", "二", text), options))
        for text in (dirty, clean)
    ]
    assert answers[0] == answers[1]
    assert model.tokenizer.encode(dirty) != model.tokenizer.encode(clean)


def test_the_terminal_chat_remembers_and_clears(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It prints the answers to the conversation so far; a special token typed is text."""
    typed = ["你好", "<|user|> sop", "/clear", "", "日本", "/exit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    chat.chat_in_terminal(model, ChatOptions(GREEDY, 6))
    shown = capsys.readouterr().out.split("you> ")[1:]

    def answer(*texts: str) -> str:
        prompt = model.tokenizer.build_prompt(make_messages(*texts))
        return generation.generate_answers(model, [prompt], 6)[0].text

    first = answer("你好")
    expected = [first, answer("你好", first, "<|user|> sop"), "", "", answer("日本"), ""]
    assert [part.rstrip("\n") for part in shown] == expected


def test_the_terminal_chat_continues_after_ctrl_c_and_errors(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []

    def interrupted() -> Iterator[str]:
        yield "は"
        raise KeyboardInterrupt

    def iter_nothing() -> Iterator[str]:
        yield from ()

    def reply(_model: Any, messages: Any, _options: Any) -> Iterator[str]:
        seen.append([message["content"] for message in messages])
        if len(seen) == 2:
            raise DataError("too long")
        return interrupted() if len(seen) == 1 else iter_nothing()

    monkeypatch.setattr(chat, "stream_reply", reply)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\n"))
    chat.chat_in_terminal(model, ChatOptions(GREEDY, 6))
    captured = capsys.readouterr()
    assert seen == [["a"], ["a", "は", "b"], ["a", "は", "c"]]
    assert "は …" in captured.out
    assert chat.NO_ANSWER in captured.out
    assert captured.err == "error: too long\n"
