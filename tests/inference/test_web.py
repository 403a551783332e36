"""The chat page: what it does without a browser, and in headless Chromium."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.errors import ArtifactError, ConfigError, DataError
from chatglm_ja.inference import chat, generation, web
from chatglm_ja.inference.chat import ChatOptions
from chatglm_ja.inference.generation import GREEDY

pytest.importorskip("gradio", reason="needs requirements-extras.txt")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# Nothing from elsewhere is asked for at the start, and root may run it.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run")  # fmt: skip

LOADS: list[str] = []


class FakeStage:
    """A stage in memory."""

    def __init__(self, name: str, model: Any, encoder: Any) -> None:
        self.name, self.loaded = name, (model, encoder)

    def open(self) -> None:
        pass

    def load(self) -> tuple[Any, Any]:
        LOADS.append(self.name)
        return self.loaded


@pytest.fixture(scope="module")
def model(resized_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(resized_dir, dtype=torch.float32).eval()


@pytest.fixture
def models(model: Any, encoder: Any) -> web.Models:
    LOADS.clear()
    stages: Any = [FakeStage(name, model, encoder) for name in ("base", "pretrained", "sft")]
    return web.Models(stages)


@pytest.fixture
def options() -> ChatOptions:
    return ChatOptions(GREEDY, max_new_tokens=1500, seconds=300.0)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((web.HOST, 0))
        return int(probe.getsockname()[1])


def answers(models: web.Models, text: str, names: tuple[str, str], **more: Any) -> list[web.Talks]:
    settings: dict[str, Any] = {
        "talks": {"left": [], "right": []},
        "max_new_tokens": 8,
        "sampling": GREEDY,
        "seconds": 60.0,
        "stopped": threading.Event(),
    }
    return list(web.stream_answers(models, names, text=text, **{**settings, **more}))


def test_both_sides_answer_and_remember(models: web.Models, model: Any, encoder: Any) -> None:
    before: web.Talks = {"left": [{"role": "user", "content": "あ"},
                                  {"role": "assistant", "content": "い"}], "right": []}  # fmt: skip
    states = answers(models, " 日本 ", ("sft", "base"), talks=before)
    assert len(states) > 5
    asked = {"role": "user", "content": "日本"}
    for side in web.SIDES:
        prompt = chat_format.build_prompt_ids(encoder, [*before[side], asked])
        text = generation.generate_answers(model, encoder, [prompt], 8)[0].text
        expected = [*before[side], asked, {"role": "assistant", "content": text}]
        assert states[-1][side] == expected
    assert before["right"] == []  # not changed in place
    alone = answers(models, "日本", ("sft", web.NOBODY))
    assert alone[-1]["right"] == []
    assert alone[-1]["left"][-1]["content"]


def test_the_last_two_models_are_kept(models: web.Models) -> None:
    for name in ("base", "sft", "base", "pretrained", "base", "sft"):
        models.get(name)
    assert LOADS == ["base", "sft", "pretrained", "sft"]


def test_messages_are_limited(models: web.Models) -> None:
    with pytest.raises(DataError, match="there is no question yet"):
        answers(models, "  ", ("sft", web.NOBODY))
    with pytest.raises(DataError, match="4,001 characters, 4,000 are allowed"):
        answers(models, "x" * 4001, ("sft", web.NOBODY))


def test_odd_names_are_refused(models: web.Models) -> None:
    for name in ("nobody", None, ["sft"]):
        with pytest.raises(DataError, match=r"there is no model .*: expected one of base, pretr"):
            answers(models, "日本", (name, web.NOBODY))  # type: ignore[arg-type]


def test_a_stop_leaves_what_was_said(models: web.Models) -> None:
    stopped = threading.Event()
    stopped.set()
    start = time.monotonic()
    states = answers(models, "日本", ("sft", "base"), max_new_tokens=1500, stopped=stopped)
    assert time.monotonic() - start < 5
    assert 0 < len(states[-1]["left"][-1]["content"]) < 100


def test_a_port_in_use_is_one_line(free_port: int) -> None:
    web.check_port(free_port)
    with socket.socket() as other:
        other.bind((web.HOST, free_port))
        other.listen()
        with pytest.raises(ConfigError, match=f"--port {free_port} of this machine cannot be used"):
            web.check_port(free_port)


@pytest.fixture
def page(models: web.Models, options: ChatOptions, free_port: int) -> Iterator[Any]:
    """The chat page in a browser that is not let out of this machine."""
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


def test_a_question_is_typed_and_its_answer_read_as_it_grows(page: Any, models: web.Models) -> None:
    question = "<script>document.title = 'run'</script> <b>日本</b> &amp;\n  二行目"
    page.fill("#question textarea", question)
    page.keyboard.press("Enter")
    wait_until(page, lambda: len(bubbles(page, "left")) == 2 and len(bubbles(page, "left")[1]) > 3)
    early = bubbles(page, "left")
    assert early[0] == question  # as text, with its spaces and line breaks
    wait_until(page, lambda: len(bubbles(page, "left")[1]) > len(early[1]))
    assert page.title() != "run"
    page.click("#stop")
    page.wait_for_timeout(500)
    kept = bubbles(page, "left")
    page.wait_for_timeout(500)
    assert bubbles(page, "left") == kept
    model, encoder = models.get("sft")
    prompt = chat_format.build_prompt_ids(encoder, [{"role": "user", "content": question}])
    assert len(kept[1]) < len(generation.generate_answers(model, encoder, [prompt], 128)[0].text)
    # A second model joins for the next question, and knows nothing of the first.
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="base").click()
    page.get_by_text("Sampling").click()
    page.get_by_label("number input for Longest answer, in tokens").fill("5")
    page.fill("#question textarea", "もう一つ")
    page.click("#send")
    wait_until(page, lambda: len(bubbles(page, "right")) == 2 and len(bubbles(page, "left")) == 4)
    assert bubbles(page, "left")[:2] == kept
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
def test_what_is_typed_meanwhile_stays_and_what_is_forgotten_is_gone(page: Any) -> None:
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


@pytest.mark.usefixtures("slow")
def test_a_question_that_waits_can_be_stopped(page: Any) -> None:
    """Two pages: the second one's question waits for the first one's answer."""
    other = page.context.browser.new_page()
    other.goto(page.url)
    other.wait_for_selector("#question textarea")
    for one in (page, other):
        one.fill("#question textarea", "一")
        one.click("#send")
    wait_until(page, lambda: len(bubbles(page, "left")) == 2)
    other.click("#stop")
    other.wait_for_timeout(300)
    page.click("#stop")
    wait_until(other, lambda: other.input_value("#question textarea") == "一")
    assert bubbles(other, "left") == []


def test_a_damaged_model_is_said_on_the_page(
    page: Any, models: web.Models, monkeypatch: pytest.MonkeyPatch
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


def test_a_wrong_message_is_said_on_the_page(page: Any) -> None:
    page.fill("#question textarea", "長" * 3000)  # more than the window of the model
    page.click("#send")
    wait_until(page, lambda: "tokens, and there is room for" in page.inner_text("body"))
    assert bubbles(page, "left") == []
