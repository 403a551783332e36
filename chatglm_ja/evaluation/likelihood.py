"""How likely a model finds texts, in units that do not depend on its vocabulary.

Bits per character compares models with different tokenizers: the sum of the cross entropies of
a text's tokens, in bits, over the number of its characters. Bits per byte is the same over its
bytes in UTF-8, in which languages of different scripts are closer. What it costs to say where the
text ends is not counted.

A text is read with the prefix of every ChatGLM3 input, [gMASK] sop, and one that is longer than
the window with a sliding one:

    ids      p p a b c d e f g h      window = 6, p = prefix
    windows  p p a b c d              a to d are scored
                   b c d e f g        e to g are scored, b to d are their context
                         e f g h      h is scored
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.chatglm3.loading import Logits
from chatglm_ja.chatglm3.tokenizer import UNK_ID
from chatglm_ja.errors import DataError
from chatglm_ja.training.model import token_losses


@dataclass(frozen=True)
class TextScore:
    """What a model made of some texts."""

    characters: int
    bytes: int
    tokens: int
    nats: float

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2) / self.characters

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def tokens_per_char(self) -> float:
        return self.tokens / self.characters


Window = tuple[tuple[int, ...], int]  # input_ids, how many at their start are context only


def cut_windows(ids: Sequence[int], context: int, size: int) -> Iterator[Window]:
    """Cut a text into windows of at most `size` tokens, in which every token is scored once.

    The first `context` ids (the prefix) are not scored. Later windows repeat half a window of
    tokens as context.
    """
    start, scored = 0, context
    while scored < len(ids):
        end = min(start + size, len(ids))
        yield tuple(ids[start:end]), scored - start
        start, scored = end - size // 2, end


def score_texts(
    model: Any,
    encoder: Any,
    texts: Iterable[str],
    window: int,
    batch_size: int,
    *,
    title: str = "scoring",
) -> TextScore:
    """Score texts with a GlmForCausalLM and the sentencepiece processor of its tokenizer."""
    scores = score_each(model, encoder, texts, window, batch_size, title=title)
    if not any(score.characters for score in scores):
        raise DataError("there is no text to score: the held-out file is empty")
    return TextScore(
        characters=sum(score.characters for score in scores),
        bytes=sum(score.bytes for score in scores),
        tokens=sum(score.tokens for score in scores),
        nats=sum(score.nats for score in scores),
    )


def score_each(
    model: Any,
    encoder: Any,
    texts: Iterable[str],
    window: int,
    batch_size: int,
    *,
    title: str = "scoring",
) -> list[TextScore]:
    """The score of every text by itself; windows of different ones are batched together."""
    prefix = chat_format.prefix_ids(encoder)
    encoded = [(text, chat_format.encode_text(encoder, text)) for text in texts]
    cuts = [list(cut_windows([*prefix, *ids], len(prefix), window)) for _, ids in encoded]
    nats = iter(_nats(model, list(itertools.chain(*cuts)), batch_size, title))
    return [
        TextScore(
            len(text), len(text.encode()), len(ids), sum(itertools.islice(nats, len(of_text)))
        )
        for (text, ids), of_text in zip(encoded, cuts, strict=True)
    ]


def score_continuations(
    model: Any,
    encoder: Any,
    asked: Sequence[tuple[str, Sequence[str]]],
    window: int,
    batch_size: int,
    *,
    title: str = "scoring",
) -> list[list[float]]:
    """How many nats each continuation costs after its text, of (text, continuations).

    Text and continuation are encoded as one, so that a piece may lie across their border. Scored
    is what follows the beginning that the ids of the text have in common with those of all its
    continuations: they are compared over the same stretch, whatever the vocabulary. Of what is too
    long for the window, the end is read. DataError if a continuation itself is too long.
    """
    prefix = chat_format.prefix_ids(encoder)
    room = window - len(prefix)
    cuts = []
    for text, continuations in asked:
        alone = chat_format.encode_text(encoder, text)
        joined = [
            chat_format.encode_text(encoder, text + continuation) for continuation in continuations
        ]
        shared = min(_shared(alone, ids) for ids in joined)
        for ids in joined:
            if len(ids) - shared >= room:
                raise DataError(
                    f"an answer to {text[-40:]!r} has {len(ids) - shared} tokens, too many for "
                    f"--window {window}"
                )
            dropped = max(0, len(ids) - room)
            cuts.append(((*prefix, *ids[dropped:]), len(prefix) + shared - dropped))
    # A continuation may stand after the same text more than once.
    distinct = list(dict.fromkeys(cuts))
    nats = dict(zip(distinct, _nats(model, distinct, batch_size, title), strict=True))
    scores = iter(nats[cut] for cut in cuts)
    return [[next(scores) for _ in continuations] for _, continuations in asked]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


@torch.inference_mode()
def _nats(model: Any, cuts: Sequence[Window], batch_size: int, title: str) -> list[float]:
    """The nats of the scored tokens of every window, in their order."""
    # Windows of like length together: little padding. Padding comes after the text, where a
    # causal model's predictions cannot see it.
    order = sorted(range(len(cuts)), key=lambda index: len(cuts[index][0]))
    nats = [0.0] * len(cuts)
    # A loss in bfloat16 has three digits: too few to compare choices of a token or two.
    weight = model.lm_head.weight.float()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc=title, unit=" batches", leave=False, delay=1):
        longest = len(cuts[batch[-1]][0])
        input_ids = torch.full((len(batch), longest), UNK_ID)
        labels = torch.full((len(batch), longest), chat_format.IGNORE_INDEX)
        for row, index in enumerate(batch):
            ids, context = cuts[index]
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, context : len(ids)] = torch.tensor(ids[context:])
        hidden = model.model(input_ids=input_ids.to(model.device), use_cache=False)
        states = hidden.last_hidden_state.float()
        losses = token_losses(states, weight, labels.to(model.device)).double()
        counts = [len(cuts[index][0]) - cuts[index][1] for index in batch]
        for index, part in zip(batch, losses.split(counts), strict=True):
            nats[index] = part.sum().item()
    return nats


def divergence(before: Logits, after: Logits) -> torch.Tensor:
    """The Kullback-Leibler divergence of the next token's distribution `after` from that `before`,
    in bits, position by position: [length]. What `after` gives to other ids is lost."""
    old, new = (logits.float() - total[:, None] for logits, total in (before, after))
    return (old.exp() * (old - new)).sum(dim=-1) / math.log(2)
