"""The chat page: what it does without a browser, and in headless Chromium."""

import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from chatglm_ja.errors import ArtifactError, ConfigError, DataError
from chatglm_ja.inference import chat, web
from chatglm_ja.inference.generation import GREEDY, Answer, ChatOptions
from chatglm_ja.inference.models import LoadedModel

pytest.importorskip("gradio", reason="needs requirements-extras.txt")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# The browser runs as root, and makes no requests of its own.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run")  # fmt: skip

PHONE: Any = {"width": 390, "height": 844}
EXAMPLES = ("日本の首都はどこですか。", "What is 1 < 2 & 3?")

LOADS: list[str] = []


class FakeStage:
    """A stage whose model is in memory."""

    def __init__(self, name: str, model: LoadedModel) -> None:
        self.name, self.title, self.model = name, f"the model {name}", model

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


def answer(models: web.ModelCache, session: web.Session, name: str, tokens: int = 8) -> None:
    """Let a model write the whole answer that it owes."""
    steps = web.answer_question(models, session, name, ChatOptions(GREEDY, tokens, 60.0))
    assert sum(1 for _ in steps) > 3


def reply(model: LoadedModel, messages: list[dict[str, Any]], tokens: int = 8) -> str:
    return list(chat.stream_reply(model, messages, ChatOptions(GREEDY, tokens)))[-1].text


def test_every_model_answers_in_its_own_conversation(
    models: web.ModelCache, model: LoadedModel
) -> None:
    session = web.Session()
    session.ask(" 日本 ", ["sft"])
    answer(models, session, "sft")
    session.ask("东京", ["sft", "base"])
    assert session.waiting == {"sft", "base"}
    for name in ("sft", "base"):
        answer(models, session, name)
    assert session.waiting == set()

    expected: list[dict[str, Any]] = []
    for name, questions in (("base", ["东京"]), ("sft", ["日本", "东京"])):
        expected = []
        for question in questions:
            expected.append({"role": "user", "content": question})
            expected.append({"role": "assistant", "content": reply(model, expected)})
        assert session.conversations[name].messages == expected


def test_a_cut_answer_is_continued(models: web.ModelCache, model: LoadedModel) -> None:
    session = web.Session()
    session.ask("日本", ["sft"])
    answer(models, session, "sft", 8)
    conversation = session.conversations["sft"]
    assert not conversation.ended
    begun = [dict(message) for message in conversation.messages]
    shown = web.show_conversation(conversation, is_waiting=False)
    assert "continue" in shown[-1]["options"][0]["label"]
    session.resume("sft")
    assert "options" not in web.show_conversation(conversation, is_waiting=True)[-1]
    answer(models, session, "sft", 30)
    assert conversation.messages[1]["content"] == reply(model, begun, 30)
    assert len(conversation.messages[1]["content"]) > len(begun[1]["content"])


def test_an_answer_that_ended_by_itself_is_not_cut(
    models: web.ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        chat, "stream_reply", lambda *_: (Answer("は", 2, stopped=done) for done in (False, True))
    )
    session = web.Session()
    session.ask("日本", ["sft"])
    list(web.answer_question(models, session, "sft", ChatOptions(GREEDY, 8)))
    assert (
        "options" not in web.show_conversation(session.conversations["sft"], is_waiting=False)[-1]
    )


def test_the_last_two_models_stay_in_memory(models: web.ModelCache) -> None:
    for name in ("base", "sft", "base", "pretrained", "base", "sft"):
        models.get(name)
    assert LOADS == ["base", "sft", "pretrained", "sft"]


def test_questions_that_cannot_be_asked() -> None:
    session = web.Session()
    with pytest.raises(DataError, match="the question is empty"):
        session.ask("  ", ["sft"])
    with pytest.raises(DataError, match="4,001 characters, 4,000 are allowed"):
        session.ask("x" * 4001, ["sft"])
    session.ask("日本", ["sft"])
    for again in (lambda: session.ask("东京", ["sft"]), lambda: session.resume("sft")):
        with pytest.raises(DataError, match="still being answered: wait, or press Stop"):
            again()
    assert len(session.conversations["sft"].messages) == 2


@pytest.mark.parametrize("pieces", [0, 3])
def test_a_closed_answer_stays_in_the_conversation(models: web.ModelCache, pieces: int) -> None:
    session = web.Session()
    session.ask("日本", ["sft"])
    steps = web.answer_question(models, session, "sft", ChatOptions(GREEDY, 1500, 60.0))
    for _ in range(pieces):
        next(steps)
    session.stop()
    session.ask("东京", ["base"])
    start = time.monotonic()
    steps.close()
    assert time.monotonic() - start < 5
    assert session.waiting == {"base"}  # the stopped answer does not disturb the next question
    conversation = session.conversations["sft"]
    shown = web.show_conversation(conversation, is_waiting=False)[-1]
    assert (shown["content"]["text"] == chat.NO_ANSWER) == (pieces == 0)
    assert len(conversation.messages[-1]["content"]) < 100
    assert shown["options"]  # it can be continued


def test_a_question_that_cannot_be_answered_is_taken_out(models: web.ModelCache) -> None:
    """An answer that cannot be continued stays."""
    session = web.Session()
    session.ask("日本", ["sft"])
    answer(models, session, "sft")
    session.ask("長" * 3000, ["sft"])  # more than the window of the model
    with pytest.raises(DataError, match="tokens, expected at most"):
        answer(models, session, "sft")
    conversation = session.conversations["sft"]
    assert [message["content"] for message in conversation.messages[::2]] == ["日本"]
    conversation.messages[-1]["content"] = "長" * 3000
    session.resume("sft")
    with pytest.raises(DataError, match="ask for shorter answers"):
        answer(models, session, "sft")
    assert len(conversation.messages[-1]["content"]) == 3000


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
    served = web.build_page(models, "sft", options, EXAMPLES)
    web.launch_page(served, free_port)
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
            context = browser.new_context(
                viewport=PHONE, permissions=["clipboard-read", "clipboard-write"]
            )
            opened = context.new_page()
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
    """Real answers, which grow at most twenty times a second."""
    stream_reply = chat.stream_reply

    def reply(*arguments: Any) -> Iterator[Answer]:
        for answer in stream_reply(*arguments):
            time.sleep(0.05)
            yield answer

    monkeypatch.setattr(chat, "stream_reply", reply)


def compare_with(page: Any, name: str) -> None:
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name=name).click()


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
    whole = reply(models.get("sft"), [{"role": "user", "content": question}], 128)
    assert len(stopped[1]) < len(whole)
    # A second model joins for the next question and does not know the first one.
    compare_with(page, "base")
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
    """Answers that take ten seconds, and are cut."""

    def reply(_model: Any, messages: Any, _options: Any) -> Iterator[Answer]:
        text = messages[-1]["content"] + " " if messages[-1]["role"] == "assistant" else ""
        for number in range(40):
            time.sleep(0.25)
            text += f"{number}<&>\n"
            yield Answer(text.strip(), number, stopped=False)

    monkeypatch.setattr(chat, "stream_reply", reply)


@pytest.mark.usefixtures("slow")
def test_an_example_is_asked_and_its_answer_copied_and_continued(page: Any) -> None:
    assert page.locator("#left .example").all_inner_texts() == list(EXAMPLES)
    page.locator("#left .example").nth(1).click()
    wait_until(page, lambda: len(bubbles(page, "left")) == 2)
    assert bubbles(page, "left")[0] == EXAMPLES[1]
    wait_until(page, lambda: "1<&>" in bubbles(page, "left")[1])
    assert page.locator("#left .option").count() == 0
    page.click("#stop")
    page.wait_for_selector("#left .option")
    assert page.inner_text("#left .option") == "… cut here: continue"
    cut = bubbles(page, "left")[1]
    page.click("#left [aria-label=Copy]")
    wait_until(page, lambda: page.evaluate("navigator.clipboard.readText()") == cut)
    page.click("#left .option")
    wait_until(page, lambda: " 0<&>" in bubbles(page, "left")[1])
    assert bubbles(page, "left")[1].startswith(cut)
    assert len(bubbles(page, "left")) == 2
    page.click("#stop")


@pytest.mark.usefixtures("slow")
def test_the_question_is_shown_at_once_and_the_pane_that_waits_says_so(page: Any) -> None:
    """Both panes are named after their models, and Stop is there only while one answers."""
    compare_with(page, "base")
    page.wait_for_selector("#right")
    for side, name in (("left", "sft"), ("right", "base")):
        assert page.inner_text(f"#{side} label").strip() == f"the model {name}"
    assert page.locator("#stop").count() == 0
    page.fill("#question textarea", "一")
    page.click("#send")
    wait_until(page, lambda: len(bubbles(page, "left")) == 2)
    assert bubbles(page, "right") == ["一"]
    assert page.locator("#right .pending").count() == 1
    assert page.locator("#left .pending").count() == 0
    assert page.locator("#send").count() == 0
    page.click("#stop")
    page.wait_for_selector("#send")
    assert page.locator("#stop").count() == 0
    assert bubbles(page, "right") == ["一", chat.NO_ANSWER]
    # Another model on the left shows its own conversation, and its name.
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="pretrained").click()
    wait_until(page, lambda: bubbles(page, "left") == [])
    assert page.inner_text("#left label").strip() == "the model pretrained"


def test_two_panes_and_the_buttons_fit_a_phone(page: Any) -> None:
    compare_with(page, "base")
    page.wait_for_selector("#right")
    boxes = {name: page.locator(f"#{name}").bounding_box() for name in ("right", "send", "clear")}
    assert boxes["send"]["y"] == boxes["clear"]["y"]
    assert boxes["right"]["height"] > 200
    assert boxes["send"]["y"] + boxes["send"]["height"] < PHONE["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.usefixtures("slow")
def test_typing_during_an_answer_and_new_conversations(page: Any) -> None:
    page.fill("#question textarea", "一")
    page.click("#send")
    wait_until(page, lambda: len(bubbles(page, "left")) == 2 and "1" in bubbles(page, "left")[1])
    page.fill("#question textarea", "")
    page.locator("#question textarea").press_sequentially("次の質問", delay=150)
    page.keyboard.press("Enter")
    wait_until(page, lambda: "still being answered" in page.inner_text("body"))
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
    page.fill("#question textarea", "一")
    page.click("#send")
    wait_until(page, lambda: len(bubbles(page, "left")) == 2)
    other.fill("#question textarea", "二")
    other.click("#send")
    other.wait_for_selector("#left .pending")
    other.wait_for_timeout(1000)
    assert bubbles(other, "left") == ["二"]  # one answer at a time
    other.click("#stop")
    wait_until(other, lambda: bubbles(other, "left") == ["二", chat.NO_ANSWER])
    page.click("#stop")
    other.wait_for_timeout(1500)
    assert bubbles(other, "left") == ["二", chat.NO_ANSWER]
    other.click("#left .option")
    wait_until(other, lambda: "1<&>" in "".join(bubbles(other, "left")))


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
    """The question comes back, and the other model's answer stays."""

    def damaged() -> None:
        raise ArtifactError("the folder is damaged")

    monkeypatch.setattr(models.stages["base"], "open", damaged)
    compare_with(page, "base")
    page.get_by_text("Sampling").click()
    page.get_by_label("number input for Longest answer, in tokens").fill("5")
    page.fill("#question textarea", "一")
    page.click("#send")
    wait_until(page, lambda: "the folder is damaged" in page.inner_text("body"))
    page.wait_for_selector("#send")
    assert page.input_value("#question textarea") == "一"
    assert bubbles(page, "right") == []
    assert len(bubbles(page, "left")) == 2


def test_a_bug_in_an_answer_leaves_the_page_usable(
    page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(chat, "stream_reply", fail)
    page.fill("#question textarea", "一")
    page.click("#send")
    wait_until(page, lambda: bubbles(page, "left") == ["一", chat.NO_ANSWER])
    page.wait_for_selector("#send")


def test_a_long_message_is_shown_as_an_error(page: Any) -> None:
    page.fill("#question textarea", "長" * 3000)  # more than the window of the model
    page.click("#send")
    wait_until(page, lambda: "tokens, expected at most" in page.inner_text("body"))
    wait_until(page, lambda: page.input_value("#question textarea") == "長" * 3000)
    assert bubbles(page, "left") == []
