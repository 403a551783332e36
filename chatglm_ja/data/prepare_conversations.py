"""Training examples for fine-tuning: conversations as ids and labels, whole, packed into bins.

A conversation has ChatGLM3's format (chat.py) and is trained on the assistant's part only. One that
is longer than a bin loses its oldest exchanges, never a part of an answer.

    filter                 drops a conversation
    no answer at the end   whose last question is not answered
    too long               whose last exchange alone is longer than a bin (or, with
                           --long-conversations drop, that is longer as a whole)
    duplicate              that occurred before
"""

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.data import arrow, conversations, dedup, mixing, packing, units
from chatglm_ja.data.index import Index, make_index
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.errors import DataError
from chatglm_ja.storage.inputs import Input

TRAIN, VALIDATION = "sft_train", "sft_validation"


@dataclass(frozen=True)
class ConversationPreparer:
    """Makes the unit of a chunk of conversations."""

    tokenizer: Path
    max_length: int
    cut: bool

    def __call__(self, task: units.Task) -> dict[str, Any]:
        unit = units.Unit(file=Path(task.chunk.file).name)
        for conversation in conversations.parse_conversations(task.chunk, task.source):
            if isinstance(conversation, conversations.Conversation):
                self._add(unit, conversation)
            else:
                unit.rejects.append(conversation)
        return unit.write(task.stem)

    def _add(self, unit: units.Unit, conversation: conversations.Conversation) -> None:
        messages = conversation.messages
        unit.found += 1
        unit.text_bytes += sum(len(message["content"].encode()) for message in messages)
        if messages[-1]["role"] != "assistant":
            unit.counts["no answer at the end"] += 1
            return
        encoder, prefix = _tools(self.tokenizer)
        parts = [chat_format.message_ids(encoder, message) for message in messages]
        roles = [message["role"] for message in messages]
        lengths = [len(part) for part in parts]
        room = self.max_length - len(prefix) - 1  # </s>
        if sum(lengths) > room:
            oldest = conversations.last_exchanges(messages, lengths, room)
            if not self.cut or oldest == len(messages):
                unit.counts["too long"] += 1
                return
            first = 1 if roles[0] == "system" else 0
            del parts[first : first + oldest], roles[first : first + oldest]
            # Not a drop: the conversation is kept without its beginning.
            unit.counts["shortened"] += 1
        ids, labels = chat_format.join_example(prefix, roles, parts)
        unit.tokens.append(np.array(ids, dtype=np.int32))
        unit.labels.append(np.array(labels, dtype=np.int32))
        unit.record.append(conversation.record)
        # Of the example: conversations that differ in what was left out are the same to a model.
        unit.digest.append(dedup.text_digest(np.array(ids, dtype="<i4").tobytes()))
        unit.identity.append(units.identity(conversation.id))


@functools.cache
def _tools(folder: Path) -> tuple[Any, list[int]]:
    encoder = tokenizer.load_processor(folder)
    return encoder, chat_format.prefix_ids(encoder)


def contents(config: PrepareDataConfig, inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """What shapes the units of each source: its files, its settings, the tokenizer."""
    read = {source.role: source for source in inputs}
    shared = {
        "tokenizer": read["step2_merge_tokenizer"].fingerprint,
        "max_length": config.max_length,
        "long_conversations": config.long_conversations,
    }
    return units.contents(config.sft_sources, read["conversations"].source_fingerprints, shared)


def prepare(config: PrepareDataConfig, folders: Sequence[Path]) -> Index:
    """Turn every source into units of examples in its folder; ids that were seen are dropped."""
    preparer = ConversationPreparer(
        config.tokenizer, config.max_length, config.long_conversations == "cut"
    )
    return make_index(preparer, config.sft_sources, folders, config, "conversations")


def write(
    index: Index, config: PrepareDataConfig, shares: Mapping[str, float], folder: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """Draw conversations to `shares`, pack and write them; returns counts and those to train on."""
    index.drop_duplicates()
    train, validation = _draw(index, config, shares)
    plans = {}
    for name, documents in ((TRAIN, train), (VALIDATION, validation)):
        plan = packing.plan_best_fit(index.length[documents], config.max_length)
        plans[name] = plan.take(np.random.default_rng(config.seed).permutation(len(plan)))
        arrow.write_shards(
            folder, name, plans[name], index, documents,
            processes=config.num_processes, with_labels=True,
        )  # fmt: skip
    tokens = int(index.length[train].sum())
    sources = []
    for number, source in enumerate(config.sft_sources):
        mine = train[index.source[train] == number]
        sources.append(
            {
                "name": source.title,
                **index.counts(number),
                "train_examples": len(mine),
                "train_tokens": int(index.length[mine].sum()),
            }
        )
    bins = len(plans[TRAIN])
    counts = {
        "train_examples": _by_language(index, config, shares, train),
        "validation_examples": _by_language(index, config, shares, validation),
        "train_bins": bins,
        "train_tokens": tokens,
        "train_fill": round(tokens / (bins * config.max_length), 4),
        "validation_bins": len(plans[VALIDATION]),
        "max_length": config.max_length,
        "sources": sources,
    }
    return counts, train


def _draw(
    index: Index, config: PrepareDataConfig, shares: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The conversations to train on and to validate on, each kind's in a random order."""
    wanted = mixing.apportion(config.sft_examples, shares)
    kept_back = mixing.apportion(config.sft_validation_examples, shares)
    train, validation, lacking = [], [], []
    for kind in shares:
        rng = np.random.default_rng([config.seed, zlib.crc32(kind.encode())])
        order = rng.permutation(index.usable(kind))
        need = kept_back[kind] + wanted[kind]
        if len(order) < need:
            lacking.append(
                f"{kind} has {len(order):,} usable conversations for a share of {need:,}"
            )
            continue
        is_kept = _keep_back(index.source[order], kept_back[kind])
        validation.append(order[is_kept])
        train.append(order[~is_kept][: wanted[kind]])
    if lacking:
        raise DataError(f"{'; '.join(lacking)}: lower --sft-examples or add sources")
    return np.concatenate(train), np.concatenate(validation)


def _keep_back(sources: np.ndarray, count: int) -> np.ndarray:
    """Which conversations of a kind are for validation, the first of each source; bool.

    Every source that has more than one gives one at least, if that is possible, and of the rest
    in proportion to what it has: so the loss of each can be measured.
    """
    kept = np.zeros(len(sources), dtype=bool)
    numbers, available = np.unique(sources, return_counts=True)
    first = np.minimum(available - 1, 1)
    if count < first.sum():
        first[:] = 0
    rest = count - int(first.sum())
    if rest:
        left = {str(n): int(size) for n, size in enumerate(available - first)}
        first += np.array(list(mixing.apportion(rest, left).values()))
    for number, size in zip(numbers, first, strict=True):
        kept[np.flatnonzero(sources == number)[:size]] = True
    return kept


def _by_language(
    index: Index, config: PrepareDataConfig, shares: Mapping[str, float], chosen: np.ndarray
) -> dict[str, int]:
    kinds = np.array([source.language for source in config.sft_sources])[index.source[chosen]]
    return {kind: int((kinds == kind).sum()) for kind in shares}
