"""Chats: the prompt fits the window, and nothing typed becomes a special token."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.bases import families
from chatglm_ja.bases.interface import FormatError
from chatglm_ja.errors import DataError
from chatglm_ja.inference import chat
from chatglm_ja.inference.generation import GREEDY, Answer, ChatOptions
from chatglm_ja.inference.models import LoadedModel
from tests.tiny_models import make_base


def make_messages(*texts: str) -> list[chat.Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def test_the_oldest_exchanges_are_left_out(model: LoadedModel) -> None:
    messages = make_messages("一", "二", "三", "四", "五")

    def build(size: int, *before: chat.Message) -> list[int]:
        prompt, begun = chat.build_fitting_prompt(model.tokenizer, [*before, *messages], size)
        assert begun == []
        return prompt

    whole = model.tokenizer.build_prompt(messages)
    assert build(len(whole)) == whole
    assert build(len(whole) - 1) == model.tokenizer.build_prompt(messages[2:])
    last = model.tokenizer.build_prompt(messages[4:])
    assert build(len(last)) == last
    system: chat.Message = {"role": "system", "content": "s"}
    short = model.tokenizer.build_prompt([system, *messages[4:]])
    assert build(len(short), system) == short
    with pytest.raises(DataError, match=r"the message has .* tokens, expected at most"):
        build(len(last) - 1)


def test_an_answer_to_continue_follows_its_prompt(model: LoadedModel) -> None:
    """Without the token that would end it; the oldest exchanges are left out as for a question."""
    messages = make_messages("一", "二", "三", "日本語の答えは")
    prompt, begun = chat.build_fitting_prompt(model.tokenizer, messages, 1000)
    assert prompt == model.tokenizer.build_prompt(messages[:-1])
    assert model.tokenizer.decode(begun).strip() == messages[-1]["content"]
    assert not set(begun) & set(model.tokenizer.stop_ids)
    size = len(prompt) + len(begun)
    short, same = chat.build_fitting_prompt(model.tokenizer, messages, size - 1)
    assert (short, same) == (model.tokenizer.build_prompt(messages[2:3]), begun)
    with pytest.raises(DataError, match="ask for shorter answers, or in parts"):
        chat.build_fitting_prompt(model.tokenizer, messages, len(short) + len(begun) - 1)


def test_an_answer_to_continue_in_a_chat_template(tmp_path: Path) -> None:
    folder = make_base("llama", tmp_path, ["a quick brown fox", "日本語の答えは"])
    tokenizer = families.open_base(folder).tokenizer
    messages = make_messages("日本", "a quick brown")
    prompt, begun = chat.build_fitting_prompt(tokenizer, messages, 1000)
    assert prompt == tokenizer.build_prompt(messages[:1])
    assert begun == tokenizer.encode("a quick brown")


def test_a_message_too_long_for_the_model_is_an_error(model: LoadedModel) -> None:
    limit = model.window
    around = len(model.tokenizer.build_prompt(make_messages("")))
    with pytest.raises(DataError, match=rf"expected at most {limit - 10 - around}: shorten it"):
        chat.stream_reply(model, make_messages("长" * limit), ChatOptions(GREEDY, 10))
    # Half of the window stays for the conversation, however long the answer may become.
    assert next(chat.stream_reply(model, make_messages("长"), ChatOptions(GREEDY, 10 * limit)))


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
    for place in (0, 2):  # an earlier question too
        texts = ["一", "二", "三"]
        answers = []
        for texts[place] in (dirty, clean):
            answers.append(list(chat.stream_reply(model, make_messages(*texts), options))[-1])
        assert answers[0] == answers[1]
    assert model.tokenizer.encode(dirty) != model.tokenizer.encode(clean)


def test_the_terminal_chat_remembers_and_clears(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It prints the answers to the conversation so far; a special token typed is text."""
    typed = [
        "你好",
        "<|user|> sop",
        "/continue",
        "/clear",
        "",
        "/continue",
        "日本",
        "/exit",
        "never",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    chat.chat_in_terminal(model, "sft", ChatOptions(GREEDY, 6))
    shown = capsys.readouterr().out.split("you> ")[1:]

    def answer(*texts: str) -> str:
        return list(chat.stream_reply(model, make_messages(*texts), ChatOptions(GREEDY, 6)))[
            -1
        ].text

    first, second, third = answer("你好"), "<|user|> sop", answer("日本")
    begun = answer("你好", first, second)
    continued = answer("你好", first, second, begun)
    assert continued.startswith(begun)
    rest = continued[len(begun) :]
    assert rest
    lines = [
        *(f"sft> {text} …\n" for text in (first, begun, rest)),
        "",
        "",
        "",
        f"sft> {third} …\n",
    ]
    assert shown == [*lines, ""]


def test_the_terminal_chat_continues_after_ctrl_c_and_errors(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []

    def interrupted() -> Iterator[Answer]:
        yield Answer("は", 1, stopped=False)
        raise KeyboardInterrupt

    def reply(_model: Any, messages: Any, _options: Any) -> Iterator[Answer]:
        seen.append([message["content"] for message in messages])
        if len(seen) == 2:
            raise DataError("too long")
        text = "" if len(seen) == 3 else "d"
        return interrupted() if len(seen) == 1 else (Answer(t, 1, stopped=True) for t in [text])

    monkeypatch.setattr(chat, "stream_reply", reply)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\n/continue\n"))
    chat.chat_in_terminal(model, "base", ChatOptions(GREEDY, 6))
    captured = capsys.readouterr()
    # An answer without text is continued as if it had not begun.
    assert seen == [["a"], ["a", "は", "b"], ["a", "は", "c"], ["a", "は", "c"]]
    answers = [part.rstrip("\n") for part in captured.out.split("you> ")[1:]]
    assert answers == ["base> は …", "", f"base> {chat.NO_ANSWER}", "base> d", ""]
    assert captured.err == "error: too long\n"
