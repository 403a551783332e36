"""The rows of a run: opened, checked against the model, and in which order they are trained.

Step 6 may replay pretraining blocks among its conversations, so that what they taught is not
forgotten (arXiv 2403.08763):

    epoch 1    all conversations, and blocks 0 to n - 1 of a random order, shuffled together
    epoch 2    all conversations, and blocks n to 2n - 1
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from chatglm_ja.bases import families
from chatglm_ja.bases.shape import read_shape
from chatglm_ja.data import dataset
from chatglm_ja.errors import DataError
from chatglm_ja.training.settings import SftConfig, TrainingConfig

log = logging.getLogger(__name__)


class EpochSampler(Sampler[int]):
    """Draws an epoch's rows in random order, less those that fill no global batch.

    So the steps of an epoch do not depend on micro-batches and processes, and no process gets a row
    twice to have as many as the others. Rows from `own` on are blocks to replay, of which every
    epoch has `replayed` others, until all have been drawn. The order depends on seed and epoch.
    """

    def __init__(self, own: int, blocks: int, replayed: int, batch: int, seed: int) -> None:
        self.own, self.replayed, self.seed = own, replayed, seed
        self.rows = own + replayed  # of an epoch, those included that it leaves out
        self.dropped = self.rows % batch
        self.blocks = own + torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
        self.epoch = 0

    def mix(self, own: float, replayed: float) -> float:
        """Return the mean over an epoch of something that its own and the replayed rows have."""
        return (self.own * own + self.replayed * replayed) / self.rows

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows - self.dropped

    def __iter__(self) -> Iterator[int]:
        rows = torch.arange(self.own)
        if self.replayed:
            drawn = torch.arange(self.replayed) + self.epoch * self.replayed
            rows = torch.cat([rows, self.blocks[drawn % len(self.blocks)]])
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator)[: len(self)]
        yield from rows[order].tolist()


def open_rows(config: TrainingConfig, name: str) -> tuple[Any, Any]:
    """Open the training and validation rows; raise DataError if they do not fit the model."""
    shape = read_shape(config.model)
    splits = [dataset.load_rows(config.data, name, split) for split in ("train", "validation")]
    tokenizer = families.load_tokenizer(config.model) if name == "sft" else None
    for split, rows in zip(("train", "validation"), splits, strict=True):
        dataset.check_rows(rows, config.block_size, shape, config.data, name)
        if tokenizer is not None:
            dataset.check_conversations(rows, config.data, split, tokenizer)
    if config.evaluations and not len(splits[1]):
        raise DataError(
            f"{config.data} has no validation rows of {name}: prepare some, or pass --evaluations 0"
        )
    train_set, validation = splits if config.packing else map(dataset.unpack_rows, splits)
    if len(train_set) < config.global_batch_size:
        raise DataError(
            f"the data has {len(train_set)} rows, but a step takes {config.global_batch_size}: "
            "lower --global-batch-size or prepare more data"
        )
    return train_set, validation


def make_sampler(config: TrainingConfig, rows: Any) -> tuple[Any, EpochSampler]:
    """Return the rows, with the blocks to replay behind them, and their order.

    Raises DataError if the blocks do not fit the model.
    """
    own, replayed = len(rows), 0
    if isinstance(config, SftConfig) and config.replay:
        pretraining = dataset.load_rows(config.data, "pretrain", "train")
        # They may be longer than rows of conversations.
        dataset.check_rows(pretraining, None, read_shape(config.model), config.data, "pretrain")
        if not config.packing:
            pretraining = dataset.unpack_rows(pretraining)
        rows = dataset.append_blocks(rows, pretraining)
        replayed = round(config.replay * own)
        log.info("replaying %d pretraining blocks among %d rows an epoch", replayed, own)
    blocks = len(rows) - own
    return rows, EpochSampler(own, blocks, replayed, config.global_batch_size, config.seed)
