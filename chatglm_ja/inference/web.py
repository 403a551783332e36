"""A web page to chat with one model, or with two side by side, made with Gradio (optional).

Every model has a conversation of its own; a pane shows that of the model it is named after. A
question is shown at once in every pane, and then the models answer one after the other. Gradio's
queue lets one page answer at a time.

The page is served to this machine only, needs no network, and shows messages and answers as plain
text. The server limits their length and the time of an answer.
"""

import html
import importlib.util
import logging
import os
import socket
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from chatglm_ja.errors import ConfigError, DataError, UserError
from chatglm_ja.inference import chat
from chatglm_ja.inference.chat import Exchange
from chatglm_ja.inference.generation import ChatOptions, Sampling
from chatglm_ja.inference.models import LoadedModel, Stage

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_MESSAGE = 4000  # characters
MAX_TOKENS = 2048  # of an answer
MAX_WAITING = 16  # questions and answers in the queue
MODELS_IN_MEMORY = 2
NO_MODEL = "(none)"

# With what is above and below it, a pane fills the window.
PANE_HEIGHT = "max(160px, 100dvh - 330px)"

# Keeps line breaks and spaces. Hides Gradio's own button for clearing, which would leave the
# conversation in the server's memory, and the frame around "waiting". In a narrow window two panes,
# one below the other, fill it, and each example is one line.
CSS = """
footer, .chat [aria-label="Clear"], .chat .thought-group .arrow { display: none !important; }
.chat .thought-group { border: none; padding: 0; }
.chat .md { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  #panes:has(#right) .chat { height: max(160px, 50dvh - 173px) !important; }
  #panes:has(#right) .example { padding: 8px; }
  #panes:has(#right) .example * {
    display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  }
}
"""

# Copies the last answer of a pane as it is shown. Gradio's own button would copy it as HTML.
COPY = """() => {
  const answers = document.querySelectorAll("#%s .bot .md");
  if (answers.length) navigator.clipboard.writeText(answers[answers.length - 1].innerText);
}"""


class Session:
    """What a page has: the conversation of every model, and the models that have yet to answer.

    The latter are a new list for every question, so that an answer that is still being stopped does
    not disturb the next one.
    """

    def __init__(self) -> None:
        self.conversations: dict[str, list[Exchange]] = defaultdict(list)
        self.waiting: list[str] = []

    def ask(self, text: str, names: Sequence[str]) -> None:
        """Add a question, which the models are to answer, to their conversations.

        Raises DataError, before it changes any, for a question that is empty or too long, and while
        an answer is being written.
        """
        text = text.strip()
        if not text:
            raise DataError("the question is empty: type one")
        if len(text) > MAX_MESSAGE:
            raise DataError(
                f"the message has {len(text):,} characters, {MAX_MESSAGE:,} are allowed"
            )
        self.resume(names)
        for name in self.waiting:
            self.conversations[name].append(Exchange(text))

    def resume(self, names: Sequence[str]) -> None:
        """Let models go on with their last answers. Raises DataError while one is written."""
        if self.waiting:
            raise DataError("the last question is still being answered: wait, or press Stop")
        self.waiting = list(dict.fromkeys(names))

    def stop(self) -> None:
        """Wait for no more answers."""
        self.waiting.clear()

    def answer(
        self, models: "ModelCache", options: ChatOptions
    ) -> Generator[tuple[str, str] | None]:
        """Let the waiting models answer, one after the other; yield whenever something has changed.

        For what a model cannot answer or continue, an error is yielded, and the question if that
        was taken out of the conversation. Closing the generator stops the model; the conversation
        keeps what was answered.
        """
        waiting = self.waiting
        try:
            while waiting:
                name, failure = waiting[0], None
                exchanges = self.conversations[name]
                last = exchanges[-1]
                try:
                    model = models.get(name)
                    yield None  # so that a stop while the model was loaded takes effect
                    with closing(chat.stream_answer(model, exchanges, options)) as growth:
                        yield from growth
                except UserError as error:
                    question = ""
                    if not last.answer.ids:
                        exchanges.remove(last)
                        question = last.question
                    failure = f"{name}: {error}", question
                del waiting[:1]  # none if it was stopped meanwhile
                yield failure
        finally:
            waiting.clear()

    def show(self, name: str) -> list[dict[str, Any]]:
        """Return a model's conversation as Gradio's messages; a cut answer has a button."""
        exchanges = self.conversations[name]
        shown = []
        for exchange in exchanges:
            shown.append(_make_message("user", exchange.question))
            shown.append(_make_message("assistant", exchange.answer.text or chat.NO_ANSWER))
        if not exchanges or exchanges[-1].answer.stopped:
            return shown
        if name not in self.waiting:
            shown[-1]["options"] = [{"value": "", "label": f"{chat.CUT} cut here: continue"}]
        elif not exchanges[-1].answer.text:
            shown[-1] = _make_message("assistant", "", title="waiting", status="pending")
        return shown


def _make_message(role: str, text: str, **metadata: str) -> dict[str, Any]:
    # Gradio would read the text as HTML, and drop the indent of a bare string.
    content = {"type": "text", "text": html.escape(text, quote=False)}
    return {"role": role, "content": content, "metadata": metadata}


def check_port(port: int) -> None:
    """Check, before any model is loaded, that Gradio is installed and the port is free.

    Raises ConfigError if not.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("--web needs Gradio: run `pip install -r requirements-extras.txt`")
    with socket.socket() as probe:
        # Set by the server too: a port that was released a moment ago counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"--port {port} of this machine cannot be used ({error.strerror}): choose another"
            ) from None


def serve(
    stages: Sequence[Stage],
    first: Stage,
    options: ChatOptions,
    examples: Sequence[str],
    port: int,
) -> None:
    """Serve the page until Ctrl-C; at first the stage `first` answers on the left.

    An empty page offers the questions `examples`.
    """
    models = ModelCache(stages)
    models.get(first.name)
    page = build_page(models, first.name, options, examples)
    launch_page(page, port)
    log.info("chat page: http://%s:%d (Ctrl-C ends)", HOST, port)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


def launch_page(page: Any, port: int) -> None:
    """Start to serve a page, to this machine only, and return."""
    from gradio.themes import Default

    for name in ("NO_PROXY", "no_proxy"):  # Gradio sends a request to its own server
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST, "localhost")))

    page.launch(
        server_name=HOST,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        max_file_size=1,  # bytes: nothing is uploaded
        footer_links=[],
        css=CSS,
        # Local fonts: the theme's own would be downloaded.
        theme=Default(
            font=["system-ui", "Noto Sans CJK JP", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
    )


class ModelCache:
    """The models of stages, loaded on first use; the two used last stay in memory."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        # A canceled question may still be loading a model when the next one asks for it.
        self._lock = threading.Lock()

    def get(self, name: str) -> LoadedModel:
        """Return a stage's model."""
        with self._lock:
            if name not in self._loaded:
                while len(self._loaded) >= MODELS_IN_MEMORY:
                    self._loaded.popitem(last=False)
                self._loaded[name] = chat.load_model(self.stages[name])
            self._loaded.move_to_end(name)
            return self._loaded[name]


def build_page(
    models: ModelCache, first: str, options: ChatOptions, examples: Sequence[str] = ()
) -> Any:
    """Build the page, as Gradio's Blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    titles = {name: stage.title for name, stage in models.stages.items()}

    def show(session: Session, *names: str) -> list[Any]:
        """Return what `shown` shows: the panes of two models, and Send or Stop."""
        panes = [
            gradio.update(
                value=session.show(name), label=titles.get(name), visible=name != NO_MODEL
            )
            for name in names
        ]
        is_busy = bool(session.waiting)
        return [*panes, gradio.update(visible=not is_busy), gradio.update(visible=is_busy)]

    def pick(example: gradio.SelectData) -> str:
        return str(example.value["text"])

    def ask(session: Session, text: str, *names: str) -> list[Any]:
        try:
            session.ask(text, [name for name in names if name != NO_MODEL])
        except DataError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        return ["", *show(session, *names)]

    def resume(side: int, session: Session, *names: str) -> list[Any]:
        session.resume([names[side]])
        return show(session, *names)

    def answer(
        session: Session, left: str, right: str, temperature: float, top_p: float, longest: float
    ) -> Iterator[list[Any]]:
        sampling = Sampling(temperature, top_p)
        chosen = replace(options, sampling=sampling, max_new_tokens=int(longest))
        with closing(session.answer(models, chosen)) as steps:
            for failure in steps:
                question = ""
                if failure:
                    error, question = failure
                    gradio.Warning(error)
                yield [question or gradio.skip(), *show(session, left, right)]

    def stop(session: Session, *names: str) -> list[Any]:
        session.stop()
        return show(session, *names)

    def start_anew(*names: str) -> list[Any]:
        # Not the old session emptied: an answer that is being stopped may still write to that.
        session = Session()
        return [session, *show(session, *names)]

    with gradio.Blocks(title="Chat", analytics_enabled=False) as page:
        # A value, which Gradio copies for every page: a function would run when the page is loaded,
        # and could replace a conversation that has started meanwhile.
        session = gradio.State(Session())
        stages = list(models.stages)
        with gradio.Row():
            left = gradio.Dropdown(stages, value=first, label="Model", min_width=140)
            right = gradio.Dropdown(
                [NO_MODEL, *stages], value=NO_MODEL, label="Compare with", min_width=140
            )
        with gradio.Row(elem_id="panes"):
            panes = [
                _make_pane("left", label=titles[first], examples=[{"text": q} for q in examples]),
                _make_pane("right", visible=False),
            ]
        text = gradio.Textbox(
            label="Question",
            show_label=False,
            placeholder="Question (Shift+Enter: a new line)",
            max_lines=3,
            max_length=MAX_MESSAGE,
            autofocus=True,
            elem_id="question",
        )
        with gradio.Row():
            send = gradio.Button("Send", variant="primary", min_width=100, elem_id="send")
            halt = gradio.Button(
                "Stop", variant="stop", visible=False, min_width=100, elem_id="stop"
            )
            new = gradio.Button("New chat", min_width=100, elem_id="clear")
        sliders = _sampling_sliders(options)

        state, shown = [session, left, right], [*panes, send, halt]
        # Only what Gradio queues, with a limit of its own for each event, can show an error.
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        at_once = {**hidden, "queue": False}
        picked = panes[0].example_select(pick, None, text, **hidden)
        asking: Any = ask, [session, text, left, right], [text, *shown]
        asked = [
            gradio.on([send.click, text.submit], *asking, **hidden),
            picked.then(*asking, **hidden),
        ]
        resumed = [
            pane.option_select(partial(resume, side), state, shown, **hidden)
            for side, pane in enumerate(panes)
        ]
        answering = [
            event.success(
                answer, [*state, *sliders], [text, *shown], trigger_mode="multiple",
                concurrency_limit=1, concurrency_id="models", **hidden,
            )
            for event in (*asked, *resumed)
        ]  # fmt: skip
        for event in answering:
            event.failure(show, state, shown, trigger_mode="multiple", **at_once)
        # Gradio takes a stopped answer out of its queue, or closes the generator that writes it;
        # when a page is closed it does so by itself.
        gradio.on(
            [halt.click, left.change, right.change],
            stop, state, shown, cancels=answering, **at_once,
        )  # fmt: skip
        new.click(start_anew, [left, right], [session, *shown], cancels=answering, **at_once)
    page.queue(max_size=MAX_WAITING)
    return page


def _make_pane(side: str, **options: Any) -> Any:
    """Return the pane of a side, which shows a conversation; `options` are those of a Chatbot."""
    import gradio

    copy = gradio.Button("Copy", render=False)
    pane = gradio.Chatbot(
        height=PANE_HEIGHT,
        min_width=280,
        render_markdown=False,
        latex_delimiters=[],
        buttons=[copy],
        feedback_options=None,
        elem_id=side,
        elem_classes="chat",
        **options,
    )
    copy.click(None, js=COPY % side)
    return pane


def _sampling_sliders(options: ChatOptions) -> list[Any]:
    """Return sliders for the temperature, top p and the longest answer, folded away."""
    import gradio

    length = min(options.max_new_tokens, MAX_TOKENS)
    temperature, top_p = options.sampling.temperature, options.sampling.top_p
    with gradio.Accordion("Sampling", open=False):
        return [
            gradio.Slider(0, 5, temperature, step=0.05, label="Temperature (0: greedy decoding)"),
            gradio.Slider(0.01, 1, top_p, step=0.01, label="Top p"),
            gradio.Slider(1, MAX_TOKENS, length, step=1, label="Longest answer, in tokens"),
        ]
