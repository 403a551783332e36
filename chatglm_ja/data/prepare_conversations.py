"""Step 4's fine-tuning examples: whole conversations as ids and labels, packed into bins.

A conversation has the format of the base, and one that this format cannot express is rejected. Only
the assistant's turns are trained, without those that the record says are not to be. A conversation
that is longer than a bin loses its oldest exchanges, never a part of an answer.
"""

import bisect
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja.bases.interface import FormatError
from chatglm_ja.data import conversations, dataset, decontamination, mixing, packing, token_store
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.conversations import Conversation
from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.readers import Reject
from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.data.token_store import ChunkTask, StoredChunk, TokenizedChunk
from chatglm_ja.errors import DataError
from chatglm_ja.messages import is_trained
from chatglm_ja.sources import printable


def prepare(config: PrepareDataConfig, folders: Sequence[Path]) -> DocumentIndex:
    """Tokenize every source into its folder; return the index of the conversations."""
    overlap_file = decontamination.write_overlap_file(config, folders[0])
    tokenize = functools.partial(tokenize_conversations, config, overlap_file)
    sources = config.sft_sources
    chunks = token_store.tokenize_sources(tokenize, sources, folders, config, "conversations")
    return DocumentIndex(sources, chunks)


def tokenize_conversations(
    config: PrepareDataConfig, overlap_file: Path | None, task: ChunkTask
) -> StoredChunk:
    """Filter and tokenize a chunk of conversations, unless an earlier run stored it.

    `overlap_file` holds the n-grams of the evaluation texts, see decontamination.py.
    """
    if stored := token_store.find_chunk(task.stem, task.number):
        return stored
    tokenized = TokenizedChunk(file=printable(Path(task.chunk.file).name))
    parsed = conversations.parse_conversations(task.chunk, task.source, config.unicode_form)
    for conversation in parsed:
        if not isinstance(conversation, Conversation):
            tokenized.rejects.append(conversation)
            continue
        try:
            fate = _add_conversation(tokenized, conversation, config, overlap_file)
        except FormatError as error:
            reject = Reject(error.reason, error.detail)
            tokenized.rejects.append((conversation.record, reject))
            continue
        tokenized.found += 1
        tokenized.text_bytes += conversations.count_bytes(conversation.messages)
        if fate is not Fate.KEPT:
            tokenized.counts[fate] += 1
    return tokenized.write(task.stem, task.number)


def _add_conversation(
    tokenized: TokenizedChunk,
    conversation: Conversation,
    config: PrepareDataConfig,
    overlap_file: Path | None,
) -> Fate:
    """Tokenize a conversation, without its oldest exchanges if it is too long; return its fate.

    Raises FormatError.
    """
    messages = conversation.messages
    if messages[-1]["role"] != "assistant":
        return Fate.NO_ANSWER
    build = token_store.load_tokenizer(config.tokenizer).build_example
    example = build(messages)
    is_shortened = len(example[0]) > config.max_length
    if is_shortened:
        rests = [] if config.long_conversations == "drop" else conversations.shorten(messages)[1:]
        longest = bisect.bisect_left(
            rests, True, key=lambda rest: len(build(rest)[0]) <= config.max_length
        )
        if longest == len(rests):
            return Fate.TOO_LONG
        messages = rests[longest]
        example = build(messages)
    if not any(map(is_trained, messages)):
        return Fate.UNTRAINED
    ids, labels = (np.array(row, dtype="<i4") for row in example)
    if len(decontamination.find_overlaps(ids, decontamination.load_overlap(overlap_file))):
        return Fate.CONTAMINATED
    # Not fates: the rest of the conversation is kept.
    if is_shortened:
        tokenized.counts["shortened"] += 1
    if conversation.opening_left_out:
        tokenized.counts["opening left out"] += 1
    # Examples are compared, not conversations: what was left out makes no difference to a model.
    content = ids.tobytes() + labels.tobytes()
    tokenized.add(ids, conversation.record, content, conversation.id)
    tokenized.labels.append(labels)
    return Fate.KEPT


def write(
    index: DocumentIndex, config: PrepareDataConfig, shares: Mapping[str, float], folder: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """Drop duplicates, draw conversations to fill `shares`, pack them and write the shards.

    Returns the counts for the manifest and the report, and the conversations that are trained on.
    Raises DataError if there are too few.
    """
    index.drop_duplicates()
    train, validation = _draw(index, config, shares)
    bins = {}
    for split, documents in (("train", train), ("validation", validation)):
        plan = packing.plan_best_fit(index.length[documents], config.max_length)
        bins[split] = len(plan)
        dataset.write_shards(
            folder, f"sft_{split}", plan.shuffle(config.seed), index, documents,
            processes=config.num_processes, with_labels=True,
        )  # fmt: skip
    tokens = int(index.length[train].sum())
    sources = []
    for number, source in enumerate(config.sft_sources):
        own = train[index.source[train] == number]
        sources.append(
            {
                "name": source.title,
                **index.counts(number),
                "train_examples": len(own),
                "train_tokens": int(index.length[own].sum()),
            }
        )
    kinds = np.array([source.language for source in config.sft_sources])[index.source]
    counts = {
        "train_examples": {kind: int((kinds[train] == kind).sum()) for kind in shares},
        "validation_examples": {kind: int((kinds[validation] == kind).sum()) for kind in shares},
        "train_bins": bins["train"],
        "train_tokens": tokens,
        "train_fill": round(tokens / (bins["train"] * config.max_length), 4),
        "validation_bins": bins["validation"],
        "max_length": config.max_length,
        "sources": sources,
    }
    return counts, train


def _draw(
    index: DocumentIndex, config: PrepareDataConfig, shares: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the conversations for training and for validation; each kind is in a random order."""
    train_examples = mixing.apportion(config.sft_examples, shares)
    validation_examples = mixing.apportion(config.sft_validation_examples, shares)
    train, validation, problems = [], [], []
    fix = "lower --sft-examples or add sources"
    for kind in shares:
        rng = np.random.default_rng([config.seed, zlib.crc32(kind.encode())])
        order = rng.permutation(index.kept_documents(kind))
        needed = validation_examples[kind] + train_examples[kind]
        if len(order) < needed:
            dropped = _count_dropped(index, kind)
            shown = ", ".join(f"{fate} {count:,}" for fate, count in dropped.items())
            problems.append(
                f"{kind} has {len(order):,} usable conversations for a share of {needed:,}"
                + (f" (dropped: {shown})" if shown else "")
            )
            if Fate.TOO_LONG in dropped:
                fix = "raise --max-length, lower --sft-examples or add sources"
            continue
        is_held_out = _hold_out(index.source[order], validation_examples[kind])
        validation.append(order[is_held_out])
        train.append(order[~is_held_out][: train_examples[kind]])
    if problems:
        raise DataError(f"{'; '.join(problems)}: {fix}")
    return np.concatenate(train), np.concatenate(validation)


def _count_dropped(index: DocumentIndex, kind: str) -> dict[Fate, int]:
    """Count the records of a kind that are not kept, by their fates."""
    own = [index.counts(n) for n, source in enumerate(index.sources) if source.language == kind]
    totals = {fate: sum(counts.get(fate, 0) for counts in own) for fate in Fate}
    return {fate: total for fate, total in totals.items() if total and fate is not Fate.KEPT}


def _hold_out(sources: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` conversations of a kind for validation, the first of each source; bool.

    If possible, every source with more than one conversation gives at least one, so that the loss
    of each can be measured; the rest are in proportion to the sizes of the sources.
    """
    is_held_out = np.zeros(len(sources), dtype=bool)
    numbers, available = np.unique(sources, return_counts=True)
    sizes = np.minimum(available - 1, 1)
    if count < sizes.sum():
        sizes[:] = 0
    rest = count - int(sizes.sum())
    if rest:
        left = {str(n): int(size) for n, size in enumerate(available - sizes)}
        sizes += np.array(list(mixing.apportion(rest, left).values()))
    for number, size in zip(numbers, sizes, strict=True):
        is_held_out[np.flatnonzero(sources == number)[:size]] = True
    return is_held_out
