"""The chat page: what it does without a browser, and in headless Chromium."""

import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from chatglm_ja.errors import ArtifactError, ConfigError, DataError
from chatglm_ja.inference import chat, generation, web
from chatglm_ja.inference.generation import GREEDY, ChatOptions
from chatglm_ja.inference.models import LoadedModel

pytest.importorskip("gradio", reason="needs requirements-extras.txt")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# The browser runs as root, and makes no requests of its own.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run")  # fmt: skip

LOADS: list[str] = []


class FakeStage:
    """A stage whose model is in memory."""

    def __init__(self, name: str, model: LoadedModel) -> None:
        self.name, self.model = name, model

    def open(self) -> None:
        pass

    def load(self) -> LoadedModel:
        LOADS.append(self.name)
        return self.model


@pytest.fixture
def models(model: LoadedModel) -> web.ModelCache:
    LOADS.clear()
    stages: Any = [FakeStage(name, model) for name in ("base", "pretrained", "sft")]
    return web.ModelCache(stages)


@pytest.fixture
def options() -> ChatOptions:
    return ChatOptions(GREEDY, max_new_tokens=1500, seconds=300.0)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((web.HOST, 0))
        return int(probe.getsockname()[1])


def answer(
    models: web.ModelCache,
    text: str,
    names: tuple[str, str],
    conversations: web.Conversations | None = None,
) -> web.Conversations:
    """Return the conversations with the question and its whole answers."""
    conversations = conversations or {"left": [], "right": []}
    steps = web.answer_question(models, names, conversations, text, ChatOptions(GREEDY, 8, 60.0))
    assert sum(1 for _ in steps) > 5
    return conversations


def test_both_sides_answer_and_remember(models: web.ModelCache, model: LoadedModel) -> None:
    earlier: web.Conversations = {"left": [{"role": "user", "content": "あ"},
                                  {"role": "assistant", "content": "い"}], "right": []}  # fmt: skip
    question = {"role": "user", "content": "日本"}
    expected = {}
    for side in web.SIDES:
        prompt = model.tokenizer.build_prompt([*earlier[side], question])
        text = generation.generate_answers(model, [prompt], 8)[0].text
        expected[side] = [*earlier[side], question, {"role": "assistant", "content": text}]
    assert answer(models, " 日本 ", ("sft", "base"), earlier) == expected
    alone = answer(models, "日本", ("sft", web.NO_MODEL))
    assert alone["right"] == []
    assert alone["left"][-1]["content"]


def test_the_last_two_models_stay_in_memory(models: web.ModelCache) -> None:
    for name in ("base", "sft", "base", "pretrained", "base", "sft"):
        models.get(name)
    assert LOADS == ["base", "sft", "pretrained", "sft"]


def test_messages_are_limited(models: web.ModelCache) -> None:
    with pytest.raises(DataError, match="the question is empty"):
        answer(models, "  ", ("sft", web.NO_MODEL))
    with pytest.raises(DataError, match="4,001 characters, 4,000 are allowed"):
        answer(models, "x" * 4001, ("sft", web.NO_MODEL))


def test_unknown_models_are_refused(models: web.ModelCache) -> None:
    conversations: web.Conversations = {"left": [], "right": []}
    for name in ("nobody", None, ["sft"]):
        with pytest.raises(DataError, match=r"there is no model .*: expected one of base, pretr"):
            answer(models, "日本", ("sft", name), conversations)  # type: ignore[arg-type]
    assert conversations == {"left": [], "right": []}


@pytest.mark.parametrize("pieces", [0, 3])
def test_a_closed_answer_stays_in_the_conversation(models: web.ModelCache, pieces: int) -> None:
    conversations: web.Conversations = {"left": [], "right": []}
    options = ChatOptions(GREEDY, 1500, 60.0)
    steps = web.answer_question(models, ("sft", "base"), conversations, "日本", options)
    for _ in range(1 + pieces):
        next(steps)
    start = time.monotonic()
    steps.close()
    assert time.monotonic() - start < 5
    contents = {messages[-1]["content"] for messages in conversations.values()}
    assert (contents == {chat.NO_ANSWER}) == (pieces == 0)
    assert all(0 < len(content) < 100 for content in contents)


def test_a_port_in_use_is_one_line(free_port: int) -> None:
    web.check_port(free_port)
    with socket.socket() as other:
        other.bind((web.HOST, free_port))
        other.listen()
        with pytest.raises(ConfigError, match=f"--port {free_port} of this machine cannot be used"):
            web.check_port(free_port)


@pytest.fixture
def page(models: web.ModelCache, options: ChatOptions, free_port: int) -> Iterator[Any]:
    """The chat page in a browser; it must not send a request to another machine."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs requirements-extras.txt")
    served = web.build_page(models, "sft", options)
    web.launch_page(served, free_port)
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
            opened = browser.new_page()
            requested: list[str] = []
            opened.on("request", lambda request: requested.append(request.url))
            opened.goto(f"http://{web.HOST}:{free_port}")
            opened.wait_for_selector("#question textarea")
            yield opened
            assert all(web.HOST in url for url in requested if not url.startswith("blob:"))
            browser.close()
    finally:
        served.close(verbose=False)


def bubbles(page: Any, side: str) -> list[str]:
    texts = page.locator(f"#{side} .md").all_inner_texts()
    return [text.strip().replace("\xa0", " ") for text in texts]


def wait_until(page: Any, condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def wait_for_rest(page: Any) -> list[str]:
    """Wait until no answer has grown for a second; return the left conversation."""
    shown = None
    while shown != (shown := bubbles(page, "left")):
        page.wait_for_timeout(1000)
    return shown


@pytest.fixture
def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real answers, at most twenty pieces a second."""
    stream_reply = chat.stream_reply

    def reply(*arguments: Any) -> Iterator[str]:
        for piece in stream_reply(*arguments):
            time.sleep(0.05)
            yield piece

    monkeypatch.setattr(chat, "stream_reply", reply)


@pytest.mark.usefixtures("slower")
def test_an_answer_streams_and_stops(page: Any, models: web.ModelCache) -> None:
    question = "<script>document.title = 'run'</script> <b>日本</b> &amp;\n  二行目"
    page.fill("#question textarea", question)
    page.keyboard.press("Enter")
    wait_until(page, lambda: len(bubbles(page, "left")) == 2 and len(bubbles(page, "left")[1]) > 3)
    early = bubbles(page, "left")
    assert early[0] == question  # plain text, with its spaces and line breaks
    wait_until(page, lambda: len(bubbles(page, "left")[1]) > len(early[1]))
    assert page.title() != "run"
    page.click("#stop")
    stopped = wait_for_rest(page)
    model = models.get("sft")
    prompt = model.tokenizer.build_prompt([{"role": "user", "content": question}])
    assert len(stopped[1]) < len(generation.generate_answers(model, [prompt], 128)[0].text)
    # A second model joins for the next question and does not know the first one.
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="base").click()
    page.get_by_text("Sampling").click()
    page.get_by_label("number input for Longest answer, in tokens").fill("5")
    page.fill("#question textarea", "もう一つ")
    page.click("#send")
    wait_until(page, lambda: len(bubbles(page, "right")) == 2 and len(bubbles(page, "left")) == 4)
    assert bubbles(page, "left")[:2] == stopped
    assert bubbles(page, "right")[0] == bubbles(page, "left")[2] == "もう一つ"
    page.click("#clear")
    wait_until(page, lambda: bubbles(page, "left") == bubbles(page, "right") == [])


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that take ten seconds."""

    def reply(*_: Any, **__: Any) -> Iterator[str]:
        for number in range(40):
            time.sleep(0.25)
            yield f"{number} "

    monkeypatch.setattr(chat, "stream_reply", reply)


@pytest.mark.usefixtures("slow")
def test_typing_during_an_answer_and_new_conversations(page: Any) -> None:
    page.fill("#question textarea", "一")
    page.click("#send")
    wait_until(page, lambda: len(bubbles(page, "left")) == 2 and "1" in bubbles(page, "left")[1])
    page.fill("#question textarea", "")
    page.locator("#question textarea").press_sequentially("次の質問", delay=150)
    assert page.input_value("#question textarea") == "次の質問"
    page.click("#clear")
    wait_until(page, lambda: bubbles(page, "left") == [])
    page.wait_for_timeout(1500)
    assert bubbles(page, "left") == []
    page.click("#send")
    wait_until(page, lambda: len(bubbles(page, "left")) == 2)
    assert bubbles(page, "left")[0] == "次の質問"  # and nothing before it
    page.click("#stop")


@pytest.fixture
def other(page: Any) -> Any:
    """The chat page in a second tab."""
    tab = page.context.browser.new_page()
    tab.goto(page.url)
    tab.wait_for_selector("#question textarea")
    return tab


@pytest.mark.usefixtures("slow")
def test_a_waiting_question_can_be_stopped(page: Any, other: Any) -> None:
    """The second tab's question waits for the first one's answer."""
    for tab in (page, other):
        tab.fill("#question textarea", "一")
        tab.click("#send")
        wait_until(page, lambda: len(bubbles(page, "left")) == 2)
    other.wait_for_timeout(1000)
    assert bubbles(other, "left") == []  # one question at a time
    other.click("#stop")
    other.wait_for_timeout(300)
    page.click("#stop")
    other.wait_for_timeout(1500)
    assert other.input_value("#question textarea") == "一"
    assert bubbles(other, "left") == []


@pytest.mark.usefixtures("slow")
def test_closing_the_page_ends_its_answer(page: Any, other: Any) -> None:
    """The question of the tab that stays is answered long before the ten seconds are over."""
    other.fill("#question textarea", "一")
    other.click("#send")
    wait_until(other, lambda: len(bubbles(other, "left")) == 2)
    page.fill("#question textarea", "二")
    page.click("#send")
    other.close()
    start = time.monotonic()
    wait_until(page, lambda: len(bubbles(page, "left")) == 2)
    assert time.monotonic() - start < 5


def test_a_damaged_model_is_shown_as_an_error(
    page: Any, models: web.ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged() -> None:
        raise ArtifactError("the folder is damaged")

    monkeypatch.setattr(models.stages["base"], "open", damaged)
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="base").click()
    page.fill("#question textarea", "一")
    page.click("#send")
    wait_until(page, lambda: "the folder is damaged" in page.inner_text("body"))
    assert page.input_value("#question textarea") == "一"


def test_a_long_message_is_shown_as_an_error(page: Any) -> None:
    page.fill("#question textarea", "長" * 3000)  # more than the window of the model
    page.click("#send")
    wait_until(page, lambda: "tokens, expected at most" in page.inner_text("body"))
    assert bubbles(page, "left") == []
