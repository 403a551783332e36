"""A page to talk to one model, or to two side by side, made with Gradio (optional).

It is served to this machine only, needs no network, and shows what is typed and answered as plain
text. Messages, answers and the time that an answer may take are limited on the server, and one
question is answered at a time: others wait for their turn.
"""

import html
import importlib.util
import itertools
import logging
import os
import re
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

from chatglm_ja.errors import ConfigError, DataError, UserError
from chatglm_ja.inference import chat
from chatglm_ja.inference.chat import ChatOptions
from chatglm_ja.inference.generation import Sampling
from chatglm_ja.inference.models import Stage

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_MESSAGE = 4000  # characters
MAX_TOKENS = 2048  # of an answer
MAX_WAITING = 16
NOBODY = "(none)"
SIDES = ("left", "right")
IN_MEMORY = 2

# Line breaks and spaces as they are; Gradio's own button for clearing leaves the model's memory.
CSS = """
footer, .chat [aria-label="Clear"] { display: none !important; }
.chat .md { white-space: pre-wrap; overflow-wrap: anywhere; }
"""

INDENT = re.compile(r"^[ \t]+", re.MULTILINE)

Talks = dict[str, list[chat.Message]]  # side -> messages


def check_port(port: int) -> None:
    """Raises ConfigError if Gradio is missing or the port taken, before any model is loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("--web needs Gradio: run `pip install -r requirements-extras.txt`")
    with socket.socket() as probe:
        # As the server does, so that a port that was just given back counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"--port {port} of this machine cannot be used ({error.strerror}): choose another"
            ) from None


def serve(stages: Sequence[Stage], first: Stage, options: ChatOptions, port: int) -> None:
    """Serve the page until Ctrl-C; `first` answers on the left."""
    models = Models(stages)
    models.get(first.name)
    page = build_page(models, first.name, options)
    launch_page(page, port)
    log.info("talk to it at http://%s:%d (Ctrl-C ends)", HOST, port)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


def launch_page(page: Any, port: int) -> None:
    """Begin to serve a page, to this machine only; returns at once."""
    from gradio.themes import Default

    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own server whether it is up
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
        # Fonts that are there: the theme's own would come from the network.
        theme=Default(
            font=["system-ui", "Noto Sans CJK JP", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
    )


class Models:
    """The stages' models by name, loaded when they are asked for; two of them are kept."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self._loaded: OrderedDict[str, tuple[Any, Any]] = OrderedDict()

    def get(self, name: str) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        if name not in self._loaded:
            while len(self._loaded) >= IN_MEMORY:
                self._loaded.popitem(last=False)
            self.stages[name].open()
            self._loaded[name] = self.stages[name].load()
        self._loaded.move_to_end(name)
        return self._loaded[name]


class Question:
    """A question that was sent: whether its answer shall stop, and whether all was forgotten."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.forgotten = threading.Event()


class Sessions:
    """The question at hand of every open page."""

    def __init__(self) -> None:
        self._questions: dict[str, Question] = {}

    def begin(self, session: str) -> None:
        self._questions[session] = Question()

    def get(self, session: str) -> Question:
        return self._questions.setdefault(session, Question())

    def stop(self, session: str) -> None:
        self.get(session).stopped.set()

    def forget(self, session: str) -> None:
        self.get(session).forgotten.set()
        self.stop(session)

    def end(self, session: str) -> None:
        self.stop(session)
        del self._questions[session]


def stream_answers(
    models: Models,
    names: Sequence[str],
    talks: Talks,
    text: str,
    max_new_tokens: int,
    sampling: Sampling,
    seconds: float | None,
    stopped: threading.Event,
) -> Iterator[Talks]:
    """The talks of both sides as the answers to a question grow, in turn piece by piece.

    Raises DataError for a message that is empty or too long, for the page or for a model, and for
    a model that is not there.
    """
    for name in names:
        if name not in [NOBODY, *models.stages]:
            raise DataError(
                f"there is no model {name!r}: expected one of {', '.join(models.stages)}"
            )
    text = text.strip()
    if not text:
        raise DataError("there is no question yet")
    if len(text) > MAX_MESSAGE:
        raise DataError(f"the message has {len(text):,} characters, {MAX_MESSAGE:,} are allowed")
    asked = {
        side: [*talks[side], {"role": "user", "content": text}]
        for side, name in zip(SIDES, names, strict=True)
        if name != NOBODY
    }
    given = dict.fromkeys(asked, "")

    def state() -> Talks:
        return talks | {
            side: [*messages, {"role": "assistant", "content": given[side]}]
            for side, messages in asked.items()
        }

    with ExitStack() as stack:
        streams = []
        for side, name in zip(SIDES, names, strict=True):
            if name != NOBODY:
                model, encoder = models.get(name)
                pieces = chat.stream_reply(
                    model, encoder, asked[side], max_new_tokens, sampling=sampling, seconds=seconds
                )
                streams.append(stack.enter_context(closing(pieces)))
        yield state()
        for pieces_of_sides in itertools.zip_longest(*streams, fillvalue=""):
            for side, piece in zip(given, pieces_of_sides, strict=True):
                given[side] += piece
            yield state()
            if stopped.is_set():
                break
    for side, answer in given.items():
        given[side] = answer or chat.NO_ANSWER
    yield state()


def _shown(messages: Sequence[chat.Message]) -> list[chat.Message]:
    """Messages as the page takes them: it would read their text as HTML, and dedent code."""

    def safe(text: str) -> str:
        escaped = html.escape(text, quote=False)
        return INDENT.sub(lambda found: "&nbsp;" * len(found[0].expandtabs(4)), escaped)

    return [{**message, "content": safe(message["content"])} for message in messages]


def build_page(models: Models, first: str, options: ChatOptions) -> Any:
    """The page as Gradio's Blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    sessions = Sessions()
    nothing_said: Talks = {side: [] for side in SIDES}

    def begin(text: str, request: gradio.Request) -> tuple[str, str]:
        """At once, while other questions may wait: the box is free, and Stop is for this one."""
        sessions.begin(str(request.session_hash))
        return "", text

    def ask(
        text: str,
        talks: Talks,
        left: str,
        right: str,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        request: gradio.Request,
    ) -> Iterator[tuple[Any, ...]]:
        question = sessions.get(str(request.session_hash))
        unchanged = (gradio.skip(),) * 4
        if question.stopped.is_set():  # while it waited
            yield text, *unchanged[1:]
            return
        try:
            for said in stream_answers(
                models,
                (left, right),
                talks,
                str(text),
                min(int(max_new_tokens), MAX_TOKENS),
                Sampling(float(temperature), float(top_p)),
                options.seconds,
                question.stopped,
            ):
                if question.forgotten.is_set():
                    yield unchanged
                    return
                yield gradio.skip(), said, *(_shown(said[side]) for side in SIDES)
        except (UserError, TypeError, ValueError) as error:  # the latter for odd values, by the API
            yield text, *unchanged[1:]  # to be mended
            raise gradio.Error(str(error), print_exception=False) from None

    def stop(request: gradio.Request) -> None:
        sessions.stop(str(request.session_hash))

    def leave(request: gradio.Request) -> None:
        sessions.end(str(request.session_hash))

    def forget(request: gradio.Request) -> tuple[Talks, list[Any], list[Any]]:
        sessions.forget(str(request.session_hash))
        return nothing_said, [], []

    def show_right(name: str) -> Any:
        return gradio.Column(visible=name != NOBODY)

    with gradio.Blocks(title="ChatGLM3", analytics_enabled=False) as page:
        talks = gradio.State(nothing_said)
        sent = gradio.State("")
        left, right = _model_choices(list(models.stages), first)
        boxes = []
        with gradio.Row():
            for side in SIDES:
                with gradio.Column(visible=side == "left", min_width=280) as column:
                    boxes.append(_answer_box(side))
        text = gradio.Textbox(
            label="Question",
            placeholder="Enter sends, Shift+Enter begins a new line",
            max_lines=8,
            max_length=MAX_MESSAGE,
            autofocus=True,
            elem_id="question",
        )
        with gradio.Row():
            send = gradio.Button("Send", variant="primary", elem_id="send")
            halt = gradio.Button("Stop", elem_id="stop")
            clear = gradio.Button("New conversation", elem_id="clear")
        sampling = _sampling_sliders(options)
        right.change(show_right, right, column, show_progress="hidden")
        gradio.on([send.click, text.submit], begin, text, [text, sent], queue=False).then(
            ask,
            [sent, talks, left, right, *sampling],
            [text, talks, *boxes],
            concurrency_limit=1,
            show_progress="minimal",
        )
        halt.click(stop, queue=False)
        page.unload(leave)
        clear.click(forget, None, [talks, *boxes], queue=False)
    page.queue(max_size=MAX_WAITING)
    return page


def _model_choices(names: list[str], first: str) -> tuple[Any, Any]:
    """The models of both sides."""
    import gradio

    with gradio.Row():
        left = gradio.Dropdown(
            names, value=first, label="Model", info="Another one goes on with what was said"
        )
        right = gradio.Dropdown(
            [NOBODY, *names],
            value=NOBODY,
            label="Compare with",
            info="Joins with the next question",
        )
    return left, right


def _answer_box(side: str) -> Any:
    import gradio

    return gradio.Chatbot(
        label="Answers" if side == "left" else "Compared",
        show_label=False,
        height=440,
        render_markdown=False,
        latex_delimiters=[],
        buttons=[],
        feedback_options=None,
        elem_id=side,
        elem_classes="chat",
    )


def _sampling_sliders(options: ChatOptions) -> list[Any]:
    """Temperature, top p, and the longest answer, folded away."""
    import gradio

    with gradio.Accordion("Sampling", open=False):
        return [
            gradio.Slider(
                0,
                2,
                value=options.sampling.temperature,
                step=0.05,
                label="Temperature (0: always the likeliest token)",
            ),
            gradio.Slider(0.05, 1, value=options.sampling.top_p, step=0.05, label="Top p"),
            gradio.Slider(
                1,
                MAX_TOKENS,
                value=min(options.max_new_tokens, MAX_TOKENS),
                step=1,
                label="Longest answer, in tokens",
            ),
        ]
