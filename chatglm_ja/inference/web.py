"""A web page to chat with one model, or with two side by side, made with Gradio (optional).

Every model has a conversation of its own; a pane shows that of the model it is named after. A
question is shown at once in every pane, and then the models answer one after the other, those of
other pages included: Gradio's queue holds them, and shows in each pane that it waits.

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
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from chatglm_ja.errors import ConfigError, DataError, UserError
from chatglm_ja.inference import chat
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
# conversation in the server's memory. In a narrow window two panes, one below the other, fill it.
CSS = """
footer, .chat [aria-label="Clear"] { display: none !important; }
.chat .md { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  #panes:has(#right) .chat { height: max(160px, 50dvh - 173px) !important; }
}
"""

# Copies the last answer of a pane as it is shown. Gradio's own button would copy it as HTML.
COPY = """() => {
  const answers = document.querySelectorAll("#%s .bot .md");
  if (answers.length) navigator.clipboard.writeText(answers[answers.length - 1].innerText);
}"""


@dataclass
class Conversation:
    """Questions and answers in turn, and whether the last answer ended by itself."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = True


class Session:
    """What a page has: the conversation of every model, and the models that have yet to answer.

    A question and a stop each make a new set of waiting models, so that an answer that is still
    being stopped does not disturb the next one.
    """

    def __init__(self) -> None:
        self.conversations: dict[str, Conversation] = defaultdict(Conversation)
        self.waiting: set[str] = set()

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
        self._wait_for(names)
        for name in self.waiting:
            conversation = self.conversations[name]
            conversation.messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": ""},
            ]
            conversation.ended = False

    def resume(self, name: str) -> None:
        """Let a model continue its last answer. Raises DataError while one is being written."""
        self._wait_for([name])

    def stop(self) -> None:
        """Wait for no more answers."""
        self.waiting = set()

    def _wait_for(self, names: Sequence[str]) -> None:
        if self.waiting:
            raise DataError("the last question is still being answered: wait, or press Stop")
        self.waiting = set(names)


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
                self.stages[name].open()
                self._loaded[name] = self.stages[name].load()
            self._loaded.move_to_end(name)
            return self._loaded[name]


def answer_question(
    models: ModelCache, session: Session, name: str, options: ChatOptions
) -> Generator[None]:
    """Let a model write the answer that the session waits for; yield whenever it has grown.

    Closing the generator stops the model, and the conversation keeps what was answered. A question
    that cannot be answered is taken out of it, and its DataError or ArtifactError raised.
    """
    waiting, conversation = session.waiting, session.conversations[name]
    *asked, answer = conversation.messages
    try:
        messages = [*asked, answer] if answer["content"] else asked
        with closing(chat.stream_reply(models.get(name), messages, options)) as replies:
            for reply in replies:
                answer["content"], conversation.ended = reply.text, reply.stopped
                yield
    except UserError:
        if not answer["content"]:
            del conversation.messages[-2:]
            conversation.ended = True
        raise
    finally:
        waiting.discard(name)


def show_conversation(conversation: Conversation, is_waiting: bool) -> list[dict[str, Any]]:
    """Return the messages for display. An answer that was cut has a button to continue it.

    Gradio would read a text as HTML, and drop the indent of a bare string.
    """
    shown: list[dict[str, Any]] = [
        {
            "role": message["role"],
            "content": {
                "type": "text",
                "text": html.escape(message["content"] or chat.NO_ANSWER, quote=False),
            },
        }
        for message in conversation.messages
    ]
    if is_waiting and not conversation.messages[-1]["content"]:
        return shown[:-1]
    if not is_waiting and not conversation.ended:
        shown[-1]["options"] = [{"value": "continue", "label": f"{chat.CUT} cut here: continue"}]
    return shown


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
                value=show_conversation(session.conversations[name], name in session.waiting),
                label=titles.get(name),
                visible=name != NO_MODEL,
            )
            for name in names
        ]
        is_busy = bool(session.waiting)
        return [*panes, gradio.update(visible=not is_busy), gradio.update(visible=is_busy)]

    def ask(session: Session, text: str, *names: str) -> list[Any]:
        with _errors_shown():
            session.ask(text, [name for name in names if name != NO_MODEL])
        return ["", *show(session, *names)]

    def ask_example(
        session: Session, left: str, right: str, example: gradio.SelectData
    ) -> list[Any]:
        return ask(session, example.value["text"], left, right)[1:]

    def resume(side: int, session: Session, *names: str) -> list[Any]:
        with _errors_shown():
            session.resume(names[side])
        return show(session, *names)

    def answer(
        side: int, session: Session, left: str, right: str, *sliders: float
    ) -> Iterator[tuple[Any, Any]]:
        name = (left, right)[side]
        if name not in session.waiting:
            return
        conversation = session.conversations[name]
        question = conversation.messages[-2]["content"]
        temperature, top_p, longest = sliders
        sampling = Sampling(temperature, top_p)
        chosen = replace(options, sampling=sampling, max_new_tokens=int(longest))
        try:
            with closing(answer_question(models, session, name, chosen)) as steps:
                for _ in steps:
                    yield gradio.skip(), show_conversation(conversation, is_waiting=True)
        except UserError as error:
            gradio.Warning(str(error), title="Error")
            yield question, show_conversation(conversation, is_waiting=False)

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
            max_lines=8,
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
        asked = gradio.on(
            [send.click, text.submit], ask, [session, text, left, right], [text, *shown], **hidden
        )
        picked = panes[0].example_select(ask_example, state, shown, **hidden)
        answering = []
        for side, pane in enumerate(panes):
            resumed = pane.option_select(partial(resume, side), state, shown, **hidden)
            answering += [
                event.success(
                    partial(answer, side), [*state, *sliders], [text, pane],
                    concurrency_limit=1, concurrency_id="models", trigger_mode="multiple",
                    show_progress="minimal", show_progress_on=pane, api_visibility="private",
                )
                for event in (asked, picked, resumed)
            ]  # fmt: skip
        # Shows the last pieces too, which a browser that stopped an answer did not wait for.
        for event in answering:
            for follow in (event.then, event.failure):
                follow(show, state, shown, trigger_mode="multiple", **at_once)
        # Gradio takes a stopped answer out of its queue, or closes the generator that writes it;
        # when a page is closed it does so by itself.
        gradio.on(
            [halt.click, left.change, right.change],
            stop, state, shown, cancels=answering, **at_once,
        )  # fmt: skip
        new.click(start_anew, [left, right], [session, *shown], cancels=answering, **at_once)
    page.queue(max_size=MAX_WAITING)
    return page


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Show a DataError on the page."""
    import gradio

    try:
        yield
    except DataError as error:
        raise gradio.Error(str(error), print_exception=False) from None


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
