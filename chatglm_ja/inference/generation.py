"""Generate answers: many prompts in batches, or one as a stream of text.

Prompts are token ids in the base's conversation format. An answer ends at one of its stop tokens or
at the limit. Batches are padded on the left and masked, so a greedy answer does not depend on the
others in its batch, up to rounding.
"""

import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.data.settings import UNICODE_FORM
from chatglm_ja.errors import DataError
from chatglm_ja.inference.models import LoadedModel

Prompts = Sequence[Sequence[int]]  # token ids

TIMED_TOKENS = 64
TIMED_ROUNDS = 3
MIN_TEMPERATURE = 0.01  # below it, logits divided by the temperature overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. A temperature below 0.01 means greedy decoding.

    The defaults are those of ChatGLM3's own chat.
    """

    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 50


GREEDY = Sampling(temperature=0)

# How questions are answered in evaluations: name -> the sampling, given the configured one.
DECODINGS: dict[str, Callable[[Sampling], Sampling]] = {
    "greedy": lambda configured: GREEDY,
    "sampled": lambda configured: configured,
}


@dataclass(frozen=True)
class ChatOptions:
    """How a chat answers: sampling, the longest answer in tokens, its time limit in seconds.

    `unicode_form` is that of the training data, to which questions are brought.
    """

    sampling: Sampling
    max_new_tokens: int
    seconds: float | None = None
    unicode_form: str = UNICODE_FORM


@dataclass(frozen=True)
class Answer:
    """An answer's text and length in tokens; `stopped` if it ended before the limit."""

    text: str
    tokens: int
    stopped: bool


@dataclass(frozen=True)
class Reply(Answer):
    """An answer that is streamed, with its ids, from which it can be continued exactly.

    The text of a reply that goes on leaves out a character whose bytes are not complete yet.
    """

    ids: tuple[int, ...] = ()


def generate_answers(
    model: LoadedModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    seed: int = 0,
    title: str = "answers",
    stop_ids: Sequence[int] | None = None,
) -> list[Answer]:
    """Generate an answer of at most `max_new_tokens` tokens to each prompt, in their order.

    The same seed, prompts and batch size give the same answers. An answer ends at one of
    `stop_ids`, by default the tokenizer's.
    """
    # Prompts of similar length share a batch, which keeps the padding short.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    ends = model.tokenizer.stop_ids if stop_ids is None else list(stop_ids)
    answers: dict[int, Answer] = {}
    device = model.model.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tqdm(total=len(order), desc=title, leave=False) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            output = _generate(
                model, [prompts[index] for index in batch], max_new_tokens, sampling,
                eos_token_id=ends,
            )  # fmt: skip
            for index, ids in zip(batch, output.tolist(), strict=True):
                answers[index] = _decode_answer(model.tokenizer, ids, ends)
            bar.update(len(batch))
    return [answers[index] for index in range(len(prompts))]


def check_lengths(model: LoadedModel, prompts: Prompts, max_new_tokens: int, title: str) -> None:
    """Raise DataError if a prompt and its longest answer exceed the model's window."""
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > model.window:
        raise DataError(
            f"{title}: the longest prompt has {longest:,} tokens, and an answer up to "
            f"{max_new_tokens:,}: expected {model.window:,} together, the positions of the model; "
            "ask for shorter answers or fewer examples, or leave the question out"
        )


def stream_answer(
    model: LoadedModel, prompt: Sequence[int], options: ChatOptions, begun: Sequence[int] = ()
) -> Generator[Reply]:
    """Stream the answer to a prompt, again and again as it grows; the last one is the whole answer.

    `begun` are the ids of an earlier reply to the prompt, which is continued. Only the last reply
    can be `stopped`; if it is not, it was cut at a limit. A thread generates ahead of the reader.
    Closing the generator stops the thread after its current token, and so does the time limit.
    Errors of the thread are raised here.
    """
    replies: queue.SimpleQueue[Reply | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    def stop_when_closed(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), closed.is_set(), device=input_ids.device)

    def generate() -> None:
        try:
            output = _generate(
                model, [[*prompt, *begun]], options.max_new_tokens, options.sampling,
                streamer=_ReplyStreamer(model.tokenizer, begun, replies.put),
                stopping_criteria=StoppingCriteriaList([stop_when_closed]),
                max_time=options.seconds,
            )  # fmt: skip
            replies.put(_decode_reply(model.tokenizer, [*begun, *output[0].tolist()]))
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            replies.put(DataError(f"the GPU's memory is full: ask for shorter answers ({reason})"))
        except BaseException as error:
            replies.put(error)
        else:
            replies.put(None)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        while (reply := replies.get()) is not None:
            if isinstance(reply, BaseException):
                raise reply
            yield reply
    finally:
        closed.set()
        thread.join()


def tokens_per_second(model: LoadedModel, prompt: Sequence[int]) -> float:
    """Measure how fast a single answer is generated, in tokens per second after the first token.

    Returns the best of three rounds; a round is the median over 64 tokens. On a GPU the host
    limits the speed, and it is busy at times.
    """
    speeds = []
    times: list[float] = []
    clock = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    for _ in range(TIMED_ROUNDS):
        times.clear()
        _generate(
            model, [prompt], TIMED_TOKENS, GREEDY, streamer=clock, min_new_tokens=TIMED_TOKENS
        )
        # The first time is the prompt's.
        speeds.append(1 / statistics.median(b - a for a, b in itertools.pairwise(times[1:])))
    return max(speeds)


@torch.inference_mode()
def _generate(
    model: LoadedModel, prompts: Prompts, max_new_tokens: int, sampling: Sampling, **options: Any
) -> torch.Tensor:
    """Return the ids of the answers, [batch, length]; `options` are those of `generate`."""
    network, tokenizer = model.model, model.tokenizer
    if sampling.temperature >= MIN_TEMPERATURE:
        options["logits_processor"] = LogitsProcessorList([_Sampler(sampling)])
    rows = [torch.tensor(prompt) for prompt in prompts]
    input_ids = pad_sequence(rows, True, tokenizer.pad_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
    # Embedding rows that pad the matrix have no id in the tokenizer.
    unused = list(range(tokenizer.size, network.config.vocab_size))
    output: torch.Tensor = network.generate(
        input_ids.to(network.device),
        attention_mask=mask.to(network.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,  # _Sampler leaves a single token, which is then the likeliest
        pad_token_id=tokenizer.pad_id,
        suppress_tokens=unused or None,
        **{"eos_token_id": tokenizer.stop_ids} | options,
    )
    return output[:, input_ids.shape[1] :]


def _decode_answer(
    tokenizer: ModelTokenizer, ids: list[int], stop_ids: list[int] | None = None
) -> Answer:
    """Decode the ids up to the first stop token; padding follows it."""
    stop_ids = tokenizer.stop_ids if stop_ids is None else stop_ids
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    text = tokenizer.decode(ids[:end]).strip()
    return Answer(text, len(ids) if end is None else end + 1, stopped=end is not None)


def _decode_reply(tokenizer: ModelTokenizer, ids: list[int]) -> Reply:
    answer = _decode_answer(tokenizer, ids)
    text = answer.text if answer.stopped else answer.text.rstrip("\ufffd")
    return Reply(text, answer.tokens, answer.stopped, tuple(ids))


class _Sampler(LogitsProcessor):
    """Samples the next token with temperature, top_k and top_p as transformers defines them.

    transformers' own processors sort the whole vocabulary and sample from all of it, which for a
    hundred answers at once on a CPU takes longer than the model.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the score of the sampled token to 0 and all others to -inf: [batch, vocabulary]."""
        probabilities, ids = self.top_candidates(scores)
        sampled = ids.gather(-1, torch.multinomial(probabilities, 1))
        return torch.full_like(scores, -torch.inf).scatter(-1, sampled, 0.0)

    def top_candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the candidates' probabilities, and their ids: both [batch, top_k]."""
        count = min(self.sampling.top_k or scores.shape[-1], scores.shape[-1])
        best, ids = (scores.float() / self.sampling.temperature).topk(count)
        probabilities = best.softmax(dim=-1)
        likelier = probabilities.cumsum(dim=-1) - probabilities  # the sum over likelier tokens
        return best.masked_fill(likelier >= self.sampling.top_p, -torch.inf).softmax(dim=-1), ids


class _ReplyStreamer(BaseStreamer):
    """Passes on a reply whenever its text has grown.

    It holds back trailing space until something follows it.
    """

    def __init__(
        self, tokenizer: ModelTokenizer, begun: Sequence[int], pass_on: Callable[[Reply], None]
    ) -> None:
        self.tokenizer = tokenizer
        self.pass_on = pass_on
        self.begun = begun
        self.ids: list[int] | None = None  # None until the prompt has arrived
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = [*self.begun]
            return
        self.ids += [token for token in value.tolist() if token not in self.tokenizer.stop_ids]
        reply = _decode_reply(self.tokenizer, self.ids)
        if len(reply.text) > len(self.text) and reply.text.startswith(self.text):
            self.pass_on(reply)
            self.text = reply.text

    def end(self) -> None:
        pass
