"""The chat page: what it does without a browser, and in headless Chromium.

In the browser a stub writes the answers, as fast as a test tells it to, and a test waits for what
the page shows: nothing depends on how fast the machine is.
"""

import re
import shutil
import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.errors import ArtifactError, ConfigError, DataError
from chatglm_ja.inference import chat, web
from chatglm_ja.inference.chat import Exchange
from chatglm_ja.inference.generation import GREEDY, ChatOptions, Reply
from chatglm_ja.inference.models import LoadedModel

pytest.importorskip("gradio", reason="needs requirements-extras.txt")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# The browser runs as root, and makes no requests of its own.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run")  # fmt: skip

PATIENCE = 120_000  # milliseconds until the page must show what a test expects, on a busy machine
PHONE: Any = {"width": 390, "height": 844}
STAGES = ("base", "pretrained", "damaged", "sft")
EXAMPLES = ("日本の首都はどこですか。", "What is 1 < 2 & 3?", "お元気ですか。" * 9, "你好")
BREVITY = ChatOptions(GREEDY, max_new_tokens=8)


class FakeStage:
    """A stage whose model is in memory."""

    def __init__(self, name: str, model: LoadedModel) -> None:
        self.name, self.title, self.model = name, f"the model {name}", model
        self.folder = Path(name)
        self.loads = 0

    def open(self) -> None:
        if self.name == "damaged":
            raise ArtifactError("the folder is damaged")

    def load(self) -> LoadedModel:
        self.loads += 1
        return self.model


@pytest.fixture(scope="module")
def models(model: LoadedModel) -> web.ModelCache:
    stages: Any = [FakeStage(name, model) for name in STAGES]
    return web.ModelCache(stages)


@pytest.fixture
def session() -> web.Session:
    return web.Session()


def reply(model: LoadedModel, *exchanges: Exchange) -> str:
    for _ in chat.stream_answer(model, exchanges, BREVITY):
        pass
    return exchanges[-1].answer.text


def test_every_model_answers_in_its_own_conversation(
    session: web.Session, models: web.ModelCache, model: LoadedModel
) -> None:
    session.ask(" 日本 ", ["sft"])
    assert set(session.answer(models, BREVITY)) == {None}
    session.ask("东京", ["sft", "base", "sft"])
    assert session.waiting == ["sft", "base"]
    list(session.answer(models, BREVITY))
    assert session.waiting == []
    for name, questions in (("base", ["东京"]), ("sft", ["日本", "东京"])):
        expected: list[Exchange] = []
        for question in questions:
            expected.append(Exchange(question))
            assert reply(model, *expected)
        assert session.conversations[name] == expected


def test_a_cut_answer_is_continued(
    session: web.Session, models: web.ModelCache, model: LoadedModel
) -> None:
    session.ask("日本", ["sft"])
    list(session.answer(models, BREVITY))
    cut = session.show("sft")[-1]
    assert cut["options"][0]["label"] == "… cut here: continue"
    session.resume(["sft"])
    assert "options" not in session.show("sft")[-1]
    list(session.answer(models, BREVITY))
    whole = Exchange("日本")
    list(chat.stream_answer(model, [whole], ChatOptions(GREEDY, 16)))
    assert session.conversations["sft"] == [whole]


def test_an_answer_that_ended_by_itself_is_not_cut(session: web.Session) -> None:
    session.conversations["sft"] = [Exchange("日本", Reply("", 1, stopped=True))]
    assert session.show("sft")[-1]["content"]["text"] == chat.NO_ANSWER
    assert "options" not in session.show("sft")[-1]


def test_the_last_two_models_stay_in_memory(model: LoadedModel) -> None:
    stages: Any = [FakeStage(name, model) for name in STAGES]
    models = web.ModelCache(stages)
    for name in ("base", "sft", "base", "pretrained", "base", "sft"):
        models.get(name)
    assert [stage.loads for stage in stages] == [1, 1, 0, 2]


def test_questions_that_cannot_be_asked(session: web.Session) -> None:
    with pytest.raises(DataError, match="the question is empty"):
        session.ask("  ", ["sft"])
    with pytest.raises(DataError, match="4,001 characters, 4,000 are allowed"):
        session.ask("x" * 4001, ["sft"])
    session.ask("日本", ["sft"])
    for again in (lambda: session.ask("东京", ["sft"]), lambda: session.resume(["sft"])):
        with pytest.raises(DataError, match="still being answered: wait, or press Stop"):
            again()
    assert session.conversations["sft"] == [Exchange("日本")]


@pytest.mark.parametrize("pieces", [0, 1, 4])
def test_a_closed_answer_stays_in_the_conversation(
    session: web.Session, models: web.ModelCache, pieces: int
) -> None:
    session.ask("日本", ["sft", "base"])
    steps = session.answer(models, ChatOptions(GREEDY, 1500))
    for _ in range(pieces):
        next(steps)
    session.stop()
    session.ask("东京", ["base"])
    threads = threading.active_count()
    steps.close()
    assert threading.active_count() == threads - (pieces > 1)  # the model writes no further
    assert session.waiting == ["base"]  # the stopped answer does not disturb the next question
    shown = session.show("sft")[-1]
    assert (shown["content"]["text"] == chat.NO_ANSWER) == (pieces < 2)
    assert shown["options"]  # it can be continued


def test_an_answer_that_ends_while_it_is_stopped(
    session: web.Session, models: web.ModelCache
) -> None:
    session.ask("日本", ["sft", "base"])
    steps = session.answer(models, BREVITY)
    next(steps)
    session.stop()
    assert set(steps) == {None}
    assert session.conversations["sft"][0].answer.text
    assert session.conversations["base"] == [Exchange("日本")]


def test_a_question_that_cannot_be_answered_is_taken_out(
    session: web.Session, models: web.ModelCache
) -> None:
    """The other model answers it; an answer that cannot be continued stays."""

    def find_failure() -> tuple[str, str]:
        (failure,) = filter(None, session.answer(models, BREVITY))
        return failure

    session.ask("日本", ["damaged", "sft"])
    assert find_failure() == ("damaged: the folder is damaged", "日本")
    assert session.conversations["damaged"] == []
    (exchange,) = session.conversations["sft"]
    assert exchange.answer.text
    session.ask("長" * 3000, ["sft"])  # more than the window of the model
    error, question = find_failure()
    assert "tokens, expected at most" in error
    assert question == "長" * 3000
    assert session.conversations["sft"] == [exchange]
    exchange.answer = Reply("は", 3000, stopped=False, ids=(5,) * 3000)
    session.resume(["sft"])
    error, question = find_failure()
    assert "ask for the rest in a new question" in error
    assert question == ""
    assert session.conversations["sft"] == [exchange]


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((web.HOST, 0))
        return int(probe.getsockname()[1])


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as other:
        other.bind((web.HOST, 0))
        port = other.getsockname()[1]
        other.listen()
        with pytest.raises(ConfigError, match=f"--port {port} of this machine cannot be used"):
            web.check_port(port)
    web.check_port(port)


def test_gradio_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs Gradio: run `pip install -r requirements-extras"):
        web.check_port(0)


@pytest.fixture(scope="module")
def served(models: web.ModelCache, free_port: int) -> Iterator[str]:
    """The address of the chat page."""
    built = web.build_page(models, "sft", BREVITY, EXAMPLES)
    web.launch_page(built, free_port)
    yield f"http://{web.HOST}:{free_port}"
    built.close(verbose=False)


@pytest.fixture(scope="module")
def browser(served: str) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs requirements-extras.txt")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


class Tab:
    """The chat page in a tab of the browser, as large as a phone; it must ask no other machine."""

    def __init__(self, browser: Any, address: str) -> None:
        from playwright.sync_api import expect

        self.expect = expect
        context = browser.new_context(
            viewport=PHONE, permissions=["clipboard-read", "clipboard-write"]
        )
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.requested: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(address)
        self.question = self.page.locator("#question textarea")
        self.send, self.stop = self.page.locator("#send"), self.page.locator("#stop")
        self.question.wait_for()

    def ask(self, question: str) -> None:
        self.question.fill(question)
        self.send.click()

    def compare_with(self, name: str) -> None:
        self.page.get_by_label("Compare with").click()
        self.page.get_by_role("option", name=name).click()
        self.page.wait_for_selector("#right")

    def shows(self, side: str, *texts: str) -> None:
        """Wait until a pane shows these questions and answers."""
        messages = self.page.locator(f"#{side} .md").filter(has_text=re.compile(r"\S"))
        self.expect(messages).to_have_text(list(texts), use_inner_text=True)

    def close(self) -> None:
        self.page.context.close()
        other = [url for url in self.requested if web.HOST not in url]
        assert not [url for url in other if not url.startswith(("blob:", "data:"))]


@pytest.fixture
def tab(browser: Any, served: str) -> Iterator[Tab]:
    opened = Tab(browser, served)
    yield opened
    opened.close()


class Pen:
    """Stands in for a model: it has written `text`, and goes on until it `finishes`.

    asked    the questions that it was to answer
    closed   set when it was stopped
    """

    def __init__(self) -> None:
        self.text = ""
        self.finishes = threading.Event()
        self.asked: list[str] = []
        self.closed = threading.Event()

    def stream_answer(
        self, _model: Any, exchanges: Sequence[Exchange], _options: Any
    ) -> Generator[None]:
        last = exchanges[-1]
        begun = last.answer.text
        self.asked.append(last.question)
        try:
            while not (finishes := self.finishes.wait(0.02)) or self.text:
                if text := begun + self.text:
                    last.answer = Reply(text, 1, stopped=finishes, ids=(5,))
                yield
                if finishes:
                    return
        finally:
            self.closed.set()


@pytest.fixture
def pen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pen]:
    pen = Pen()
    monkeypatch.setattr(chat, "stream_answer", pen.stream_answer)
    yield pen
    pen.finishes.set()


def test_a_model_answers_on_the_page(tab: Tab, model: LoadedModel) -> None:
    """Question and answer are plain text, with their spaces and line breaks."""
    question = "<script>document.title = 'run'</script> <b>日本</b> &amp;\n  二行目"
    tab.question.fill(question)
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("#left .option")
    asked, answer = tab.page.locator("#left .md").all_inner_texts()
    assert asked == question
    assert answer == reply(model, Exchange(question))
    assert tab.page.title() == "Chat"


def test_an_answer_grows_and_stops(tab: Tab, pen: Pen) -> None:
    tab.ask("一")
    for pen.text in ("は", "はい", "はい、<そう>"):
        tab.shows("left", "一", pen.text)
    tab.stop.click()
    tab.send.wait_for()
    assert pen.closed.wait(PATIENCE / 1000)
    # A second model joins for the next question and does not know the first one.
    pen.text = "二つ目"
    tab.compare_with("base")
    pen.finishes.set()
    tab.ask("二")
    tab.shows("left", "一", "はい、<そう>", "二", "二つ目")
    tab.shows("right", "二", "二つ目")
    tab.send.wait_for()
    tab.page.click("#clear")
    for side in ("left", "right"):
        tab.shows(side)


def test_an_example_is_asked_and_its_answer_copied_and_continued(tab: Tab, pen: Pen) -> None:
    tab.expect(tab.page.locator("#left .example")).to_have_text(list(EXAMPLES))
    tab.page.locator("#left .example").nth(1).click()
    pen.text = "1<&>\n  2"
    tab.shows("left", EXAMPLES[1], pen.text)
    assert pen.asked == [EXAMPLES[1]]
    option = tab.page.locator("#left .option")
    tab.expect(option).to_have_count(0)
    tab.stop.click()
    tab.expect(option).to_have_text(["… cut here: continue"])
    tab.page.click("#left [aria-label=Copy]")
    copied = "text => navigator.clipboard.readText().then(copied => copied == text)"
    tab.page.wait_for_function(copied, arg=pen.text)
    option.click()
    tab.shows("left", EXAMPLES[1], pen.text * 2)
    pen.finishes.set()
    tab.send.wait_for()
    tab.expect(option).to_have_count(0)  # it ended by itself


def test_the_question_is_shown_at_once_and_the_pane_that_waits_says_so(tab: Tab, pen: Pen) -> None:
    """Both panes are named after their models, and Stop is there only while one answers."""
    tab.compare_with("base")
    labels = {side: tab.page.locator(f"#{side} label").first for side in ("left", "right")}
    tab.expect(labels["left"]).to_have_text("the model sft")
    tab.expect(labels["right"]).to_have_text("the model base")
    tab.expect(tab.stop).to_have_count(0)
    tab.ask("一")
    for side in ("left", "right"):
        tab.shows(side, "一", "waiting")
    tab.expect(tab.page.locator(".loading-spinner")).to_have_count(2)
    pen.text = "は"
    tab.shows("left", "一", "は")
    tab.shows("right", "一", "waiting")
    tab.expect(tab.send).to_have_count(0)
    tab.stop.click()
    tab.send.wait_for()
    tab.expect(tab.stop).to_have_count(0)
    tab.shows("right", "一", chat.NO_ANSWER)
    # Another model on the left shows its own conversation, and its name.
    tab.page.get_by_label("Model", exact=True).click()
    tab.page.get_by_role("option", name="pretrained").click()
    tab.expect(labels["left"]).to_have_text("the model pretrained")
    tab.shows("left")


def test_two_panes_the_examples_and_the_buttons_fit_a_phone(tab: Tab) -> None:
    tab.compare_with("base")
    tab.question.fill("長い質問" * 100)
    locators = {name: tab.page.locator(f"#{name}") for name in ("left", "right", "send", "clear")}
    locators["example"] = tab.page.locator("#left .example").last
    boxes: dict[str, Any] = {name: locator.bounding_box() for name, locator in locators.items()}
    ends = {name: box["y"] + box["height"] for name, box in boxes.items()}
    assert boxes["send"]["y"] == boxes["clear"]["y"]
    assert boxes["right"]["height"] > 200
    assert ends["example"] < ends["left"]
    assert ends["send"] < PHONE["height"]
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_typing_during_an_answer_and_new_conversations(tab: Tab, pen: Pen) -> None:
    tab.ask("一")
    tab.expect(tab.question).to_have_value("")
    for piece in ("次の", "質問"):  # what is typed stays when the answer grows
        pen.text += "は"
        tab.question.press_sequentially(piece)
        tab.shows("left", "一", pen.text)
    tab.page.keyboard.press("Enter")
    tab.page.get_by_text("still being answered: wait, or press Stop").wait_for()
    tab.expect(tab.question).to_have_value("次の質問")
    tab.page.click("#clear")
    tab.shows("left")
    assert pen.closed.wait(PATIENCE / 1000)
    tab.send.click()
    tab.shows("left", "次の質問", pen.text)  # and nothing before it


@pytest.fixture
def other(browser: Any, served: str) -> Tab:
    """The chat page in a second tab."""
    return Tab(browser, served)


def test_a_waiting_question_can_be_stopped(tab: Tab, other: Tab, pen: Pen) -> None:
    """The second tab's question waits for the first one's answer."""
    tab.ask("一")
    pen.text = "は"
    tab.shows("left", "一", "は")
    other.ask("二")
    other.shows("left", "二", "waiting")
    for pen.text in ("はい", "はい、"):
        tab.shows("left", "一", pen.text)
    assert pen.asked == ["一"]
    other.stop.click()
    other.shows("left", "二", chat.NO_ANSWER)
    tab.stop.click()
    tab.send.wait_for()
    other.page.click("#left .option")
    other.shows("left", "二", pen.text)
    assert pen.asked == ["一", "二"]
    other.close()


def test_closing_the_page_ends_its_answer(tab: Tab, other: Tab, pen: Pen) -> None:
    """The question of the tab that stays is answered then."""
    pen.text = "は"
    other.ask("一")
    other.shows("left", "一", "は")
    tab.ask("二")
    tab.shows("left", "二", "waiting")
    other.close()
    tab.shows("left", "二", "は")


def test_a_damaged_model_is_shown_as_an_error(tab: Tab, pen: Pen) -> None:
    """The question comes back, and the other model's answer stays."""
    pen.text = "は"
    pen.finishes.set()
    tab.compare_with("damaged")
    tab.ask("一")
    tab.page.get_by_text("the folder is damaged").wait_for()
    tab.expect(tab.question).to_have_value("一")
    tab.send.wait_for()
    tab.shows("left", "一", "は")
    tab.shows("right")


def test_a_bug_in_an_answer_leaves_the_page_usable(
    tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(chat, "stream_answer", fail)
    tab.ask("一")
    tab.shows("left", "一", chat.NO_ANSWER)
    tab.send.wait_for()
