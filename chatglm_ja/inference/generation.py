"""Answers of a model: many prompts at once, or one as it is written.

Prompts are token ids in ChatGLM3's conversation format (chat.py), and every answer ends at one of
its stop tokens or at the limit. A greedy answer does not depend, but for rounding, on what it is
batched with: padding is on the left and masked.
"""

import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.chatglm3.tokenizer import UNK_ID
from chatglm_ja.errors import DataError

TIMED_TOKENS = 64
TIMED_ROUNDS = 3
MIN_TEMPERATURE = 0.01  # below it the logits' quotients leave the range of floats


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are those of ChatGLM3's own chat, whose top_k was
    transformers' default then. A temperature below 0.01 is greedy: always the likeliest."""

    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 50

    def arguments(self) -> dict[str, Any]:
        """What `generate` calls it."""
        if self.temperature < MIN_TEMPERATURE:
            return {"do_sample": False}
        # The likeliest of what _Draw leaves, which is one token.
        return {"do_sample": False, "logits_processor": LogitsProcessorList([_Draw(self)])}


GREEDY = Sampling(temperature=0)


class _Draw(LogitsProcessor):
    """Draws the next token, by temperature, top_k and top_p as transformers has them.

    Its own sort the vocabulary and then draw from all of it: for a hundred answers at once on a
    CPU that took longer than the model.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [batch, vocabulary]. That of the drawn token becomes 0, the others -inf."""
        shares, ids = self.candidates(scores)
        drawn = ids.gather(-1, torch.multinomial(shares, 1))
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)

    def candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens' probabilities, and their ids: [batch, top_k] both."""
        count = min(self.sampling.top_k or scores.shape[-1], scores.shape[-1])
        best, ids = (scores.float() / self.sampling.temperature).topk(count)
        shares = best.softmax(dim=-1)
        before = shares.cumsum(dim=-1) - shares  # of all that are likelier
        return best.masked_fill(before >= self.sampling.top_p, -torch.inf).softmax(dim=-1), ids


@dataclass(frozen=True)
class Answer:
    """A model's answer; `stopped` says that it ended by itself, before the limit."""

    text: str
    tokens: int
    stopped: bool


def generate_answers(
    model: Any,
    encoder: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    seed: int = 0,
    title: str = "answers",
) -> list[Answer]:
    """An answer to each prompt, of at most `max_new_tokens` tokens, by a GlmForCausalLM.

    The same seed, prompts and batch size give the same answers. `encoder` is the sentencepiece
    processor of the model's tokenizer.
    """
    # Prompts of like length together: little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), tqdm(total=len(order), desc=title, leave=False) as bar:
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = len(prompts[chosen[-1]])
            input_ids = torch.full((len(chosen), longest), UNK_ID)
            mask = torch.zeros_like(input_ids)
            for row, index in enumerate(chosen):
                room = longest - len(prompts[index])
                input_ids[row, room:] = torch.tensor(prompts[index])
                mask[row, room:] = 1
            output = _generate(model, encoder, input_ids, mask, max_new_tokens, sampling)
            for index, ids in zip(chosen, output[:, longest:].tolist(), strict=True):
                answers[index] = _answer(encoder, ids)
            bar.update(len(chosen))
    return [answers[index] for index in range(len(prompts))]


def stream_answer(
    model: Any,
    encoder: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    seconds: float | None = None,
) -> Generator[str]:
    """The answer to a prompt, piece by piece as it is written; the pieces joined are its text.

    It is written in a thread, ahead of the reader. Closing the iterator stops it after the token
    at hand, and so does the limit of `seconds`. What goes wrong in the thread is raised here.
    """
    pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    ended = threading.Event()
    deadline = None if seconds is None else time.monotonic() + seconds

    def has_ended() -> bool:
        return ended.is_set() or (deadline is not None and time.monotonic() > deadline)

    def write() -> None:
        ids = torch.tensor([list(prompt)])
        streamer = _Pieces(encoder, pieces.put)
        try:
            _generate(
                model, encoder, ids, torch.ones_like(ids), max_new_tokens, sampling,
                streamer=streamer, stopping_criteria=StoppingCriteriaList([_Ended(has_ended)]),
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            pieces.put(DataError(f"the GPU's memory is full: ask for shorter answers ({reason})"))
        except BaseException as error:
            pieces.put(error)
        else:
            pieces.put(None)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        ended.set()
        thread.join()


def tokens_per_second(model: Any, encoder: Any, prompt: Sequence[int]) -> float:
    """How fast one answer alone is written, after its first token: by the median of 64 tokens, in
    the best of three rounds: on a GPU it is the host that limits it, and is busy at times."""
    ids = torch.tensor([list(prompt)])
    speeds = []
    for _ in range(TIMED_ROUNDS):
        clock = _Clock()
        _generate(
            model, encoder, ids, torch.ones_like(ids), TIMED_TOKENS, GREEDY,
            streamer=clock, min_new_tokens=TIMED_TOKENS,
        )  # fmt: skip
        # The first time is the prompt's, the second its answer's first token's.
        times = clock.times[1:]
        speeds.append(1 / statistics.median(b - a for a, b in itertools.pairwise(times)))
    return max(speeds)


@torch.inference_mode()
def _generate(
    model: Any,
    encoder: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    **more: Any,
) -> torch.Tensor:
    # Rows without an id in the tokenizer: padding of the embeddings.
    padding = list(range(encoder.get_piece_size(), model.config.vocab_size))
    output: torch.Tensor = model.generate(
        input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=chat_format.stop_ids(encoder),
        pad_token_id=UNK_ID,
        suppress_tokens=padding or None,
        **sampling.arguments(),
        **more,
    )
    return output


def _answer(encoder: Any, ids: list[int]) -> Answer:
    """Up to the first stop token; what follows it is padding."""
    stops = chat_format.stop_ids(encoder)
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    stopped = end is not None
    text = encoder.decode(ids[:end]).strip()
    return Answer(text, len(ids) if end is None else end + 1, stopped)


class _Ended(StoppingCriteria):
    """Ends a generation when a function says so."""

    def __init__(self, has_ended: Callable[[], bool]) -> None:
        self.has_ended = has_ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.has_ended(), device=input_ids.device)


class _Pieces(BaseStreamer):
    """Hands on the text of one answer as its tokens come, without what ends it.

    A character that is spelled in bytes is held back until it is whole, and space at the end
    until something follows it.
    """

    def __init__(self, encoder: Any, hand_on: Callable[[str], None]) -> None:
        self.encoder = encoder
        self.hand_on = hand_on
        self.stops = chat_format.stop_ids(encoder)
        self.ids: list[int] | None = None  # None until the prompt has passed
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += [token for token in value.tolist() if token not in self.stops]
        self._show(self.encoder.decode(self.ids).strip().rstrip("\ufffd"))

    def end(self) -> None:
        self._show(self.encoder.decode(self.ids or []).strip())

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.hand_on(text[len(self.shown) :])
            self.shown = text


class _Clock(BaseStreamer):
    """When the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
