"""Initializations: how the embedding rows of new pieces start, in both matrices.

Each is a function of the base's rows, the base ids of every new piece's sub-tokens, and a random
generator. It yields the new rows in order as float32 chunks [at most CHUNK_ROWS, hidden], so that
a float32 copy of a whole matrix is never in memory.

arXiv:2505.20133 and arXiv:2407.05841 compare initializations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from chatglm_ja.settings import Choice

if TYPE_CHECKING:  # --help needs the names only, and torch takes a second to import
    from torch import Generator, Tensor

CHUNK_ROWS = 2048
Subtokens = Sequence[Sequence[int]]


def subtoken_mean(weight: Tensor, subtokens: Subtokens, generator: Generator) -> Iterator[Tensor]:
    """Yield the mean of each piece's sub-token rows."""
    import torch

    for chunk in _chunks(subtokens):
        sizes = torch.tensor([len(ids) for ids in chunk])
        owners = torch.repeat_interleave(torch.arange(len(chunk)), sizes)
        rows = weight[torch.tensor([index for ids in chunk for index in ids])].float()
        sums = torch.zeros(len(chunk), weight.shape[1]).index_add_(0, owners, rows)
        yield sums / sizes.unsqueeze(1)


def overall_mean(weight: Tensor, subtokens: Subtokens, generator: Generator) -> Iterator[Tensor]:
    """Yield the mean of all base rows, for every piece."""
    mean, _ = _mean_and_deviation(weight)
    for chunk in _chunks(subtokens):
        yield mean.expand(len(chunk), -1)


def random_normal(weight: Tensor, subtokens: Subtokens, generator: Generator) -> Iterator[Tensor]:
    """Yield samples of a normal distribution with the base rows' mean and deviation."""
    import torch

    mean, deviation = _mean_and_deviation(weight)
    for chunk in _chunks(subtokens):
        yield mean + torch.randn(len(chunk), len(mean), generator=generator) * deviation


class Initialization(Choice):
    """An initialization: its name, its phrase for --help, and its function, `new_rows`."""

    SUBTOKEN_MEAN = (
        "subtoken_mean",
        "mean of the base rows of the tokens that spelled the piece before",
        subtoken_mean,
    )
    MEAN = "mean", "mean of all base rows", overall_mean
    RANDOM = "random", "normal distribution with the base rows' mean and deviation", random_normal

    def __init__(
        self,
        _name: str,
        _phrase: str,
        new_rows: Callable[[Tensor, Subtokens, Generator], Iterator[Tensor]],
    ) -> None:
        self.new_rows = new_rows


def _chunks(subtokens: Subtokens) -> Iterator[Subtokens]:
    for start in range(0, len(subtokens), CHUNK_ROWS):
        yield subtokens[start : start + CHUNK_ROWS]


def _mean_and_deviation(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 mean and standard deviation of the rows, each [hidden]."""
    import torch

    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in weight.split(CHUNK_ROWS):
        total += part.double().sum(dim=0)
        squares += part.double().square().sum(dim=0)
    mean = total / len(weight)
    return mean.float(), (squares / len(weight) - mean.square()).clamp(min=0).sqrt().float()
