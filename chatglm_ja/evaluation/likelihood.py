"""Log-likelihoods of texts, in units that do not depend on a model's vocabulary.

Bits per character compares models with different tokenizers: the sum of the cross entropies of
a text's tokens, in bits, over the number of its characters. Bits per byte divides by the bytes in
UTF-8 instead, in which scripts differ less. The end of a text is not predicted.

A text is read after the prefix of every document, for ChatGLM3 [gMASK] sop. A text longer than the
window is read with a sliding window:

    ids      p p a b c d e f g h      window = 6, p = prefix
    windows  p p a b c d              a to d are scored
                   b c d e f g        e to g are scored, b to d are their context
                         e f g h      h is scored

Windows that begin with the same tokens, such as the choices of a question, read these once.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import chain, islice, takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from chatglm_ja.bases.loading import Logits
from chatglm_ja.errors import DataError
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.training.loss import token_losses

# Windows share the reading of their beginning if that saves as many tokens.
MIN_SAVED_TOKENS = 128
# A window joins others if they share at least so many tokens, and most of what precedes the first
# scored token of each.
MIN_SHARED_TOKENS = 16
SHARED_PART = 0.8
# Rows times their common tokens: the cache of keys and values holds a copy for every row.
MAX_CACHED_TOKENS = 8192


@dataclass(frozen=True)
class TextScore:
    """The sizes of texts, and the sum of their tokens' cross entropies in nats."""

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
    """Cut a text into windows of at most `size` tokens that score every token once.

    The first `context` ids (the prefix) are not scored. Later windows repeat half a window of
    tokens as context.
    """
    start, scored = 0, context
    while scored < len(ids):
        end = min(start + size, len(ids))
        yield tuple(ids[start:end]), scored - start
        start, scored = end - size // 2, end


@dataclass(frozen=True)
class Scorer:
    """A model that scores texts: windows of at most `window` tokens, `batch_size` in a batch."""

    model: LoadedModel
    window: int
    batch_size: int

    def score_texts(self, texts: Iterable[str], title: str = "scoring") -> TextScore:
        """Return the sums of the scores of all texts. Raises DataError if the texts are empty."""
        scores = self.score_each(texts, title)
        if not any(score.characters for score in scores):
            raise DataError("there is no text to score: the held-out file is empty")
        return TextScore(*map(sum, zip(*map(astuple, scores), strict=True)))

    def score_each(self, texts: Iterable[str], title: str = "scoring") -> list[TextScore]:
        """Score every text by itself; a batch holds windows of several texts."""
        tokenizer = self.model.tokenizer
        prefix = tokenizer.prefix
        encoded = [(text, tokenizer.encode(text)) for text in texts]
        windows = [
            list(cut_windows([*prefix, *ids], len(prefix), self.window)) for _, ids in encoded
        ]
        nats = iter(self.score_windows(list(chain(*windows)), title))
        return [
            TextScore(len(text), len(text.encode()), len(ids), sum(islice(nats, len(own))))
            for (text, ids), own in zip(encoded, windows, strict=True)
        ]

    def score_continuations(
        self, questions: Sequence[tuple[str, Sequence[str]]], title: str = "scoring"
    ) -> list[list[float]]:
        """Return -log P(continuation | text) in nats, for pairs of a text and its continuations.

        Text and continuation are encoded together, so a piece may span their border. All
        continuations of a text are scored from the same place on, whatever the vocabulary: from
        where the ids of one of them first differ from those of the text alone. If the whole is too
        long for the window, its end is read. Raises DataError if a continuation itself is too long.
        """
        tokenizer = self.model.tokenizer
        prefix = tokenizer.prefix
        size = self.window - len(prefix)
        windows: list[Window] = []
        for text, continuations in questions:
            alone = tokenizer.encode(text)
            joined = [tokenizer.encode(text + end) for end in continuations]
            columns = zip(alone, *joined, strict=False)
            shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))
            for ids in joined:
                if len(ids) - shared >= size:
                    raise DataError(
                        f"an answer to {text[-40:]!r} has {len(ids) - shared} tokens, too many for "
                        f"--window {self.window}"
                    )
                dropped = max(0, len(ids) - size)
                windows.append(((*prefix, *ids[dropped:]), len(prefix) + shared - dropped))
        # A continuation may follow the same text more than once.
        distinct = list(dict.fromkeys(windows))
        nats = dict(zip(distinct, self.score_windows(distinct, title), strict=True))
        scores = iter(nats[cut] for cut in windows)
        return [[next(scores) for _ in continuations] for _, continuations in questions]

    @torch.inference_mode()
    def score_windows(self, windows: Sequence[Window], title: str) -> list[float]:
        """Return the nats of every window's scored tokens; none is longer than `window`."""
        nats = [0.0] * len(windows)
        alone: list[int] = []
        # A loss in bfloat16 has three digits: too few to compare choices of a token or two.
        weight = self.model.model.get_output_embeddings().weight.float()
        with tqdm(total=len(windows), desc=title, unit=" windows", leave=False, delay=1) as bar:
            for shared, group in group_windows(windows):
                if shared * (len(group) - 1) < MIN_SAVED_TOKENS:
                    alone += group
                    continue
                ids = torch.tensor([windows[group[0]][0][:shared]])
                cache = self._read(ids, use_cache=True).past_key_values
                rows = max(1, min(self.batch_size, MAX_CACHED_TOKENS // shared))
                for start in range(0, len(group), rows):
                    batch = group[start : start + rows]
                    tails = [(windows[i][0][shared:], windows[i][1] - shared) for i in batch]
                    own = copy.deepcopy(cache)
                    own.batch_repeat_interleave(len(batch))
                    values = self._score_batch(tails, weight, own)
                    for index, value in zip(batch, values, strict=True):
                        nats[index] = value
                    bar.update(len(batch))
            # Windows of similar length share a batch, which keeps the padding short.
            alone.sort(key=lambda index: len(windows[index][0]))
            for start in range(0, len(alone), self.batch_size):
                batch = alone[start : start + self.batch_size]
                values = self._score_batch([windows[index] for index in batch], weight)
                for index, value in zip(batch, values, strict=True):
                    nats[index] = value
                bar.update(len(batch))
        return nats

    def _score_batch(
        self, windows: Sequence[Window], weight: torch.Tensor, cache: Any = None
    ) -> list[float]:
        """Return the nats of windows that are read together, after what the cache holds."""
        rows = [torch.tensor(ids) for ids, _ in windows]
        # Padding comes after the text, where a causal model's predictions cannot see it.
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.model.tokenizer.pad_id)
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
        for row, (_, context) in zip(labels, windows, strict=True):
            row[:context] = IGNORE_INDEX
        output = self._read(input_ids, past_key_values=cache, use_cache=cache is not None)
        states = output.last_hidden_state.float()
        losses = token_losses(states, weight, labels.to(states.device)).double()
        counts = [len(ids) - context for ids, context in windows]
        return [part.sum().item() for part in losses.split(counts)]

    def _read(self, input_ids: torch.Tensor, **options: Any) -> Any:
        network = self.model.model
        return network.base_model(input_ids=input_ids.to(network.device), **options)


def group_windows(windows: Sequence[Window]) -> list[tuple[int, list[int]]]:
    """Group windows that begin alike: how many tokens they share, none scored, and their indices.

    The token before the first scored one is not shared, because it predicts that one.
    """
    groups: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(windows)), key=lambda index: windows[index]):
        ids, context = windows[index]
        if groups:
            shared, group = groups[-1]
            pairs = zip(windows[group[0]][0][:shared], ids[: context - 1], strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if common >= max(MIN_SHARED_TOKENS, SHARED_PART * max(shared, context - 1)):
                groups[-1] = (common, [*group, index])
                continue
        groups.append((context - 1, [index]))
    return groups


def compute_divergence(before: Logits, after: Logits) -> torch.Tensor:
    """Return KL(before, after) of the next token's distribution, in bits per position: [length].

    What `after` gives to ids that `before` does not have counts as lost.
    """
    old, new = (logits.float() - total[:, None] for logits, total in (before, after))
    return (old.exp() * (old - new)).sum(dim=-1) / math.log(2)
