"""Chats: the prompt fits the window, and nothing typed becomes a special token."""

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.bases.interface import FormatError
from chatglm_ja.errors import DataError
from chatglm_ja.inference import chat
from chatglm_ja.inference.chat import Exchange
from chatglm_ja.inference.generation import GREEDY, ChatOptions, Reply
from chatglm_ja.inference.models import LoadedModel, Stage
from tests.tiny_models import make_base

BREVITY = ChatOptions(GREEDY, max_new_tokens=6)


def make_messages(*texts: str) -> list[chat.Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def test_the_oldest_exchanges_are_left_out(model: LoadedModel) -> None:
    messages = make_messages("一", "二", "三", "四", "五")

    def build(size: int, *before: chat.Message) -> list[int]:
        return chat.build_fitting_prompt(model.tokenizer, [*before, *messages], size)

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


def answer(model: LoadedModel, *exchanges: Exchange, options: ChatOptions = BREVITY) -> Exchange:
    """Write the last answer to its end."""
    for _ in chat.stream_answer(model, exchanges, options):
        pass
    return exchanges[-1]


def test_a_cut_answer_goes_on_where_it_was_cut(model: LoadedModel) -> None:
    before = answer(model, Exchange("一"))
    cut = answer(model, before, Exchange("二"))
    assert len(cut.answer.ids) == 6
    shown = cut.answer.text
    answer(model, before, cut)
    whole = answer(model, before, Exchange("二"), options=replace(BREVITY, max_new_tokens=12))
    assert cut == whole
    assert cut.answer.text.startswith(shown)
    assert cut.answer.text != shown


def test_a_message_too_long_for_the_model_is_an_error(model: LoadedModel) -> None:
    limit = model.window
    around = len(model.tokenizer.build_prompt(make_messages("")))
    options = replace(BREVITY, max_new_tokens=10)
    with pytest.raises(DataError, match=rf"expected at most {limit - 10 - around}: shorten it"):
        answer(model, Exchange("长" * limit), options=options)
    # What is left when an answer is continued.
    begun = Reply("は", 7, stopped=False, ids=(5,) * 7)
    with pytest.raises(DataError, match=rf"expected at most {limit - 17 - around}: shorten it"):
        answer(model, Exchange("长" * limit, begun), options=options)
    # Half of the window stays for the conversation, however long the answer may become.
    options = replace(options, max_new_tokens=10 * limit)
    next(chat.stream_answer(model, [Exchange("长")], options))
    half = limit // 2
    begun = replace(begun, ids=(5,) * half)
    with pytest.raises(
        DataError, match=rf"has {half:,} tokens, expected fewer than {half:,}, half"
    ):
        answer(model, Exchange("长", begun), options=options)


def test_a_model_without_a_chat_format_is_an_error(tmp_path: Path) -> None:
    folder = make_base("qwen3", tmp_path, ["a quick brown fox"])
    stage = Stage("base", folder)
    assert chat.load_model(stage).tokenizer.has_chat_format
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=rf"{folder} has no chat template .*: put a chat_template"):
        chat.load_model(stage)


def test_what_the_format_cannot_express_is_an_error(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Any, _messages: Any) -> None:
        raise FormatError("refused by the chat template", "roles must alternate")

    monkeypatch.setattr(type(model.tokenizer), "build_prompt", refuse)
    with pytest.raises(DataError, match="refused by the chat template: roles must alternate"):
        answer(model, Exchange("一"))


def test_a_question_is_cleaned_as_texts_are(model: LoadedModel) -> None:
    """A decomposed question, as some keyboards and pasted file names give it, is composed."""
    dirty, clean = "\ufeffか\u3099は\u3099\u200bな \r\n", "がばな"
    for place in (0, 1):  # an earlier question too
        questions = ["一", "二"]
        answers = []
        for questions[place] in (dirty, clean):
            answers.append(answer(model, *map(Exchange, questions)).answer)
        assert answers[0] == answers[1]
    assert model.tokenizer.encode(dirty) != model.tokenizer.encode(clean)


def chat_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, model: Any, *typed: str
) -> tuple[list[str], str]:
    """Return what the terminal chat prints after each prompt, and its errors."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    chat.chat_in_terminal(model, "sft", BREVITY)
    captured = capsys.readouterr()
    return captured.out.split("you> ")[1:], captured.err


def test_the_terminal_chat_remembers_continues_and_clears(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It prints the answers to the conversation so far; a special token typed is text."""
    typed = ("你好", "<|user|> sop", "/continue", "/clear", "", "/continue", "日本", "/exit", "no")
    shown, _ = chat_with(monkeypatch, capsys, model, *typed)
    first = answer(model, Exchange("你好"))
    second = answer(model, first, Exchange("<|user|> sop"))
    begun = second.answer.text
    rest = answer(model, first, second).answer.text.removeprefix(begun)
    third = answer(model, Exchange("日本"))
    assert rest
    texts = [f"sft> {text} …\n" for text in (first.answer.text, begun, rest, third.answer.text)]
    assert shown == [*texts[:3], "", "", "no answer was cut\n", texts[3], ""]


def test_the_terminal_chat_goes_on_after_ctrl_c_and_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []

    def stream(_model: Any, exchanges: Sequence[Exchange], _options: Any) -> Iterator[None]:
        seen.append("".join(exchange.question for exchange in exchanges))
        if exchanges[-1].question == "b":
            raise DataError("too long")
        return write(exchanges[-1])

    def write(last: Exchange) -> Iterator[None]:
        if last.question != "c" or len(seen) > 3:
            last.answer = Reply(last.answer.text + "は", 1, stopped=last.question == "c", ids=(5,))
            yield
        if not last.answer.stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream_answer", stream)
    shown, errors = chat_with(
        monkeypatch, capsys, None, "a", "b", "c", "/continue", "/continue", "a", "/continue"
    )
    # A question that was not answered is forgotten; an answer without text can be continued.
    assert seen == ["a", "ab", "ac", "ac", "aca", "aca"]
    texts = ["は …", f"{chat.NO_ANSWER} …", "は", "は …", "は …"]
    lines = [f"sft> {text}\n" for text in texts]
    assert shown == [lines[0], "", *lines[1:3], "no answer was cut\n", *lines[3:], "\n"]
    assert errors == "error: too long\n"
