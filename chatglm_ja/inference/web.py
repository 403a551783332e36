"""A web page to chat with one model, or with two side by side, made with Gradio (optional).

The page is served to this machine only, needs no network, and shows messages and answers as plain
text. The server limits their length and the time of an answer. It answers one question at a time;
others wait in Gradio's queue.
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
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from chatglm_ja.errors import ConfigError, DataError, UserError
from chatglm_ja.inference import chat
from chatglm_ja.inference.generation import ChatOptions, Sampling
from chatglm_ja.inference.models import LoadedModel, Stage
from chatglm_ja.messages import Message

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_MESSAGE = 4000  # characters
MAX_TOKENS = 2048  # of an answer
MAX_WAITING = 16  # questions in the queue
MODELS_IN_MEMORY = 2
NO_MODEL = "(none)"
SIDES = ("left", "right")

# Keeps line breaks and spaces. Hides Gradio's own button for clearing, which would leave the
# conversation in the server's memory.
CSS = """
footer, .chat [aria-label="Clear"] { display: none !important; }
.chat .md { white-space: pre-wrap; overflow-wrap: anywhere; }
"""

INDENT = re.compile(r"^[ \t]+", re.MULTILINE)

Conversations = dict[str, list[Message]]  # side -> messages


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


def serve(stages: Sequence[Stage], first: Stage, options: ChatOptions, port: int) -> None:
    """Serve the page until Ctrl-C; at first the stage `first` answers on the left."""
    models = ModelCache(stages)
    models.get(first.name)
    page = build_page(models, first.name, options)
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
        """Return a stage's model. Raises DataError for an unknown name."""
        if name not in list(self.stages):  # a list, as the name may be of any type
            raise DataError(f"there is no model {name!r}: expected one of {', '.join(self.stages)}")
        with self._lock:
            if name not in self._loaded:
                while len(self._loaded) >= MODELS_IN_MEMORY:
                    self._loaded.popitem(last=False)
                self.stages[name].open()
                self._loaded[name] = self.stages[name].load()
            self._loaded.move_to_end(name)
            return self._loaded[name]


def answer_question(
    models: ModelCache,
    names: Sequence[str],
    conversations: Conversations,
    text: str,
    options: ChatOptions,
) -> Generator[None]:
    """Add a question and its answers to the conversations; yield whenever the answers have grown.

    The sides' models, one or two of `names`, answer in turn, piece by piece. Closing the generator
    stops them, and the conversations keep what was answered. Raises DataError, before it changes a
    conversation, for a message that is empty or too long and for an unknown model.
    """
    text = text.strip()
    if not text:
        raise DataError("the question is empty: type one")
    if len(text) > MAX_MESSAGE:
        raise DataError(f"the message has {len(text):,} characters, {MAX_MESSAGE:,} are allowed")
    question = {"role": "user", "content": text}
    answers, streams = [], []
    asked = [
        (conversations[side], name)
        for side, name in zip(SIDES, names, strict=True)
        if name != NO_MODEL
    ]
    with ExitStack() as stack:
        for messages, name in asked:
            pieces = chat.stream_reply(models.get(name), [*messages, question], options)
            streams.append(stack.enter_context(closing(pieces)))
        for messages, _ in asked:
            answers.append({"role": "assistant", "content": ""})
            messages += [question, answers[-1]]
        try:
            yield
            for pieces_of_sides in itertools.zip_longest(*streams, fillvalue=""):
                for answer, piece in zip(answers, pieces_of_sides, strict=True):
                    answer["content"] += piece
                yield
        finally:
            for answer in answers:
                answer["content"] = answer["content"] or chat.NO_ANSWER


def _escape_conversations(conversations: Conversations) -> list[list[Message]]:
    """Return the messages of the sides for display: Gradio would read HTML and drop indents."""

    def escape(message: Message) -> Message:
        escaped = html.escape(message["content"], quote=False)
        indented = INDENT.sub(lambda match: "&nbsp;" * len(match[0].expandtabs(4)), escaped)
        return {**message, "content": indented}

    return [[escape(message) for message in conversations[side]] for side in SIDES]


def build_page(models: ModelCache, first: str, options: ChatOptions) -> Any:
    """Build the page, as Gradio's Blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    def answer(
        text: str, conversations: Conversations, left: str, right: str, *sliders: float
    ) -> Iterator[tuple[Any, ...]]:
        box: Any = ""  # empties the question box once, when the question has moved to the answers
        try:
            temperature, top_p, longest = map(float, sliders)
            max_new_tokens = int(min(longest, MAX_TOKENS))
            sampling = Sampling(temperature, top_p)
            chosen = replace(options, sampling=sampling, max_new_tokens=max_new_tokens)
            steps = answer_question(models, (left, right), conversations, str(text), chosen)
            with closing(steps):
                for _ in steps:
                    yield box, *_escape_conversations(conversations)
                    box = gradio.skip()
        # The latter two for values that only a direct call of the API can send.
        except (UserError, TypeError, ValueError) as error:
            yield text, *[gradio.skip()] * len(SIDES)
            raise gradio.Error(str(error), print_exception=False) from None

    with gradio.Blocks(title="ChatGLM3", analytics_enabled=False) as page:
        # A value, which Gradio copies for every page: a function would run when the page is loaded,
        # and could replace a conversation that has started meanwhile.
        conversations = gradio.State({side: [] for side in SIDES})
        names = list(models.stages)
        with gradio.Row():
            info = "Another model continues the conversation"
            left = gradio.Dropdown(names, value=first, label="Model", info=info)
            info = "Answers from the next question on"
            right = gradio.Dropdown(
                [NO_MODEL, *names], value=NO_MODEL, label="Compare with", info=info
            )
        boxes = []
        with gradio.Row():
            for side in SIDES:
                with gradio.Column(visible=side == "left", min_width=280) as column:
                    boxes.append(_answer_box(side))
        text = gradio.Textbox(
            label="Question",
            placeholder="Enter sends, Shift+Enter starts a new line",
            max_lines=8,
            max_length=MAX_MESSAGE,
            autofocus=True,
            elem_id="question",
        )
        with gradio.Row():
            send = gradio.Button("Send", variant="primary", elem_id="send")
            stop = gradio.Button("Stop", elem_id="stop")
            clear = gradio.Button("New conversation", elem_id="clear")
        sliders = _sampling_sliders(options)
        right.change(
            lambda name: gradio.Column(visible=name != NO_MODEL),
            right,
            column,
            show_progress="hidden",
        )
        answering = gradio.on(
            [send.click, text.submit],
            answer,
            [text, conversations, left, right, *sliders],
            [text, *boxes],
            concurrency_limit=1,
            show_progress="minimal",
        )
        # Shows the last pieces too, which a browser that canceled its question did not wait for.
        answering.then(
            _escape_conversations,
            conversations,
            boxes,
            queue=False,
            show_progress="hidden",
            trigger_mode="multiple",
        )
        # Gradio takes a canceled question out of its queue, or closes the generator that answers
        # it; when a page is closed it does so by itself.
        gradio.on([stop.click, clear.click], None, cancels=[answering])
        # A new state, not the old one emptied: the answer being canceled may still write to that.
        clear.click(
            lambda: ({side: [] for side in SIDES}, [], []),
            None,
            [conversations, *boxes],
            queue=False,
        )
    page.queue(max_size=MAX_WAITING)
    return page


def _answer_box(side: str) -> Any:
    """Return the box that shows the conversation of a side."""
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
    """Return sliders for the temperature, top p and the longest answer, folded away."""
    import gradio

    length = min(options.max_new_tokens, MAX_TOKENS)
    temperature, top_p = options.sampling.temperature, options.sampling.top_p
    with gradio.Accordion("Sampling", open=False):
        return [
            gradio.Slider(0, 2, temperature, step=0.05, label="Temperature (0: greedy decoding)"),
            gradio.Slider(0.05, 1, top_p, step=0.05, label="Top p"),
            gradio.Slider(1, MAX_TOKENS, length, step=1, label="Longest answer, in tokens"),
        ]
