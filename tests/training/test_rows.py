"""The order in which rows are trained."""

import torch
from accelerate.data_loader import SeedableRandomSampler

from chatglm_ja.training.rows import EpochSampler


def test_an_epoch_has_each_row_once_less_those_that_fill_no_batch() -> None:
    sampler = EpochSampler(own=10, blocks=0, replayed=0, batch=4, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == len(sampler) == 8 and len({*orders[-1]} & {*range(10)}) == 8
    assert orders[0] == orders[2] != orders[1] and sampler.dropped == 2
    assert list(EpochSampler(10, 0, 0, 4, seed=2)) != orders[0]


def test_the_order_is_that_of_accelerate() -> None:
    """So a run repeats the results of versions that used its sampler."""
    torch.manual_seed(5)
    theirs = SeedableRandomSampler(range(10), num_samples=8)
    ours = EpochSampler(10, 0, 0, 4, seed=5)
    for epoch in range(2):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)


def test_every_epoch_replays_other_blocks_until_all_have_been() -> None:
    sampler = EpochSampler(own=6, blocks=7, replayed=3, batch=3, seed=1)
    replayed = []
    for epoch in range(7):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == 9
        assert {*range(6)} < {*order} <= {*range(13)}
        replayed.append([row for row in order if row >= 6])
    assert len({*replayed[0], *replayed[1]}) == 6
    counts = torch.bincount(torch.tensor(replayed).flatten() - 6)
    assert counts.tolist() == [3] * 7
    sampler.set_epoch(0)
    assert sampler.mix(0.5, 1.0) == (6 * 0.5 + 3) / 9
    assert max(order.index(row) for row in replayed[6]) > 3  # shuffled among the others


def test_blocks_may_be_fewer_than_an_epoch_replays() -> None:
    order = list(EpochSampler(own=2, blocks=3, replayed=4, batch=1, seed=1))
    assert len(order) == 6 and {*order} == {0, 1, 2, 3, 4}
