"""Step 4's data sets: written as Arrow files, read memory-mapped, collated into batches.

    pretrain_train.arrow        input_ids, lengths            blocks of block_size tokens
    pretrain_validation.arrow   input_ids, lengths, label     one language a block
    sft_train.arrow             input_ids, labels, lengths    bins of whole conversations
    sft_validation.arrow        input_ids, labels, lengths

`lengths` are those of the documents or conversations packed into the row, see packing.py.
"""

import hashlib
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import torch
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from chatglm_ja import chat, corpus, packing
from chatglm_ja.config import Source
from chatglm_ja.errors import DataError
from chatglm_ja.tokenizer import UNK_ID, encode_documents

log = logging.getLogger(__name__)

TOKENS = datasets.Sequence(datasets.Value("int32"))
SPLITS = ("train", "validation")
# A document whose digest starts with a byte below this may be kept for validation: one in 20.
VALIDATION_BYTE = 256 // 20


def path_of(folder: Path, name: str, split: str) -> Path:
    """The Arrow file of a data set, `name` being pretrain or sft."""
    return folder / f"{name}_{split}.arrow"


def read(folder: Path, name: str, split: str) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(path_of(folder, name, split)))


def describe(counts: Mapping[str, Any]) -> str:
    """Counts as one line: blocks 1,953; train_tokens ja 380,000, zh 60,000."""
    parts = []
    for name, value in counts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items()) or "none"
        parts.append(f"{name} {value if isinstance(value, str) else f'{value:,}'}")
    return "; ".join(parts)


def largest_id(rows: datasets.Dataset) -> int:
    """The largest token id of a data set, found without making Python lists of it."""
    flat = pyarrow.compute.list_flatten(rows.data.table["input_ids"])
    return pyarrow.compute.max(flat).as_py() or 0


# --- Pretraining ---------------------------------------------------------------------------------


def write_pretraining(
    folder: Path,
    tokenizer: Any,
    sources: Sequence[Source],
    shares: Mapping[str, float],
    *,
    total_tokens: int,
    validation_tokens: int,
    max_repeats: float,
    block_size: int,
    num_threads: int,
) -> dict[str, Any]:
    """Tokenise, split by document, mix to `shares` of `total_tokens`, pack; returns the counts.

    A document becomes [gMASK] sop, its tokens, </s>: the form in which ChatGLM3 reads every text.
    The split depends on a document's text alone, so a copy of a validation document cannot be
    trained on. The first `validation_tokens` (divided over the languages) of the documents
    that the split names are kept; the others that it names are trained on.
    """
    per_language = validation_tokens // len(shares)
    counts: dict[str, Any] = {"train_tokens": Counter(), "validation_tokens": Counter()}
    held_out: dict[str, set[bytes]] = {label: set() for label in shares}
    held_documents: dict[str, list[list[int]]] = {label: [] for label in shares}

    def encode(texts: Iterable[str]) -> Iterator[list[int]]:
        encoded = encode_documents(tokenizer, texts, num_threads)
        return chat.build_documents(tokenizer, encoded)

    def read_all(label: str) -> Iterator[str]:
        return corpus.texts_by_language(sources)[label]

    def choose_validation(label: str) -> None:
        """Keep documents until the language's part of the validation tokens is full."""
        for text in read_all(label):
            if counts["validation_tokens"][label] >= per_language:
                return
            digest = _digest(text)
            if digest[0] < VALIDATION_BYTE and digest not in held_out[label]:
                held_out[label].add(digest)
                document = next(encode([text]))
                held_documents[label].append(document)
                counts["validation_tokens"][label] += len(document)
        if not held_out[label]:
            log.warning("%s: too few documents to keep one of them for validation", label)

    def training_documents(label: str) -> Iterator[list[int]]:
        """The language's documents, over again up to `max_repeats` times, the last pass in part."""
        passes, first_pass_tokens, tokens = 0, 0, 0
        while passes < max_repeats:
            for ids in encode(t for t in read_all(label) if _digest(t) not in held_out[label]):
                if passes and tokens >= max_repeats * first_pass_tokens:
                    return
                tokens += len(ids)
                yield ids
            if tokens == 0:
                return
            first_pass_tokens = first_pass_tokens or tokens
            passes += 1

    if per_language:
        for label in shares:
            choose_validation(label)
    with _Writer(folder, "pretrain", "validation", label=datasets.Value("string")) as write:
        for label, documents in held_documents.items():
            for ids, lengths in packing.concat(documents, block_size):
                write({"input_ids": ids, "lengths": lengths, "label": label})

    def mixed() -> Iterator[list[int]]:
        streams = {label: training_documents(label) for label in shares}
        with tqdm(total=total_tokens, unit=" tokens", unit_scale=True, desc="pretraining") as bar:
            for label, ids in corpus.mix(streams, shares, total_tokens):
                counts["train_tokens"][label] += len(ids)
                bar.update(len(ids))
                yield ids

    blocks = tail = 0
    with _Writer(folder, "pretrain", "train") as write:
        for ids, lengths in packing.concat(mixed(), block_size):
            if len(ids) < block_size:
                tail = len(ids)
                break
            write({"input_ids": ids, "lengths": lengths})
            blocks += 1
    if not blocks:
        raise DataError(f"{total_tokens} tokens do not fill a block of {block_size}: ask for more")
    return {
        "blocks": blocks,
        "block_size": block_size,
        "tail_tokens_dropped": tail,
        **{name: dict(value) for name, value in counts.items()},
    }


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# --- Conversations -------------------------------------------------------------------------------


def write_sft(
    folder: Path,
    tokenizer: Any,
    sources: Sequence[Source],
    shares: Mapping[str, float],
    *,
    examples: int,
    validation_examples: int,
    max_length: int,
    seed: int,
) -> dict[str, Any]:
    """Draw `examples` conversations to `shares`, tokenise, pack into bins; returns the counts.

    A conversation longer than `max_length`, without an answer, with an empty one, or drawn before
    is left out and counted, and the next one drawn takes its place.
    """
    counts: dict[str, Any] = {
        "train_examples": Counter(),
        "validation_examples": Counter(),
        "left_out": Counter(),
    }
    chosen: dict[str, list[tuple[list[int], list[int]]]] = {split: [] for split in SPLITS}
    for label, share in shares.items():
        of_kind = (source for source in sources if source.label == label)
        pool = list(itertools.chain.from_iterable(map(corpus.read_conversations, of_kind)))
        random.Random(seed).shuffle(pool)
        wanted = {
            "validation": round(validation_examples * share),
            "train": round(examples * share),
        }
        bar = tqdm(total=sum(wanted.values()), desc=f"sft {label}", unit=" conversations")
        usable = _usable_examples(tokenizer, pool, max_length, counts["left_out"], bar)
        for split in ("validation", "train"):
            taken = list(itertools.islice(usable, wanted[split]))
            if len(taken) < wanted[split]:
                raise DataError(
                    f"{label} has too few conversations: {len(taken)} for {split}, where its share "
                    f"is {wanted[split]} (left out: {describe(counts['left_out']) or 'none'}): "
                    "lower --sft-examples or add sources"
                )
            counts[f"{split}_examples"][label] += len(taken)
            chosen[split] += taken
        bar.close()

    result: dict[str, Any] = {name: dict(value) for name, value in counts.items()}
    for split, pairs in chosen.items():
        bins = packing.best_fit([len(ids) for ids, _ in pairs], max_length)
        with _Writer(folder, "sft", split, labels=TOKENS) as write:
            for members in bins:
                write(
                    {
                        "input_ids": [token for i in members for token in pairs[i][0]],
                        "labels": [token for i in members for token in pairs[i][1]],
                        "lengths": [len(pairs[i][0]) for i in members],
                    }
                )
        tokens = sum(len(ids) for ids, _ in pairs)
        result[f"{split}_bins"] = len(bins)
        result[f"{split}_tokens"] = tokens
        result[f"{split}_fill"] = round(tokens / (len(bins) * max_length), 4) if bins else 0.0
    return result


def _usable_examples(
    tokenizer: Any,
    conversations: Iterable[list[dict[str, str]]],
    max_length: int,
    left_out: Counter[str],
    bar: tqdm,
) -> Iterator[tuple[list[int], list[int]]]:
    seen: set[bytes] = set()
    for messages in conversations:
        digest = _digest(json.dumps(messages, sort_keys=True))
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if not answers or messages[-1]["role"] != "assistant":
            left_out["no answer at the end"] += 1
        elif not all(answer.strip() for answer in answers):
            left_out["empty answer"] += 1
        elif digest in seen:
            left_out["duplicate"] += 1
        else:
            ids, labels = chat.build_example(tokenizer, messages)
            if len(ids) > max_length:
                left_out["longer than --max-length"] += 1
            else:
                seen.add(digest)
                bar.update()
                yield ids, labels


class _Writer:
    """Context manager around an ArrowWriter; gives the function that writes a row."""

    def __init__(self, folder: Path, name: str, split: str, **extra: Any) -> None:
        features = datasets.Features({"input_ids": TOKENS, "lengths": TOKENS, **extra})
        self._writer = ArrowWriter(features=features, path=str(path_of(folder, name, split)))

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        return self._writer.write

    def __exit__(self, *_: object) -> None:
        self._writer.finalize()
        self._writer.close()


# --- Batches -------------------------------------------------------------------------------------


class Collator:
    """Rows to a batch of tensors [rows, longest row], int64: input_ids, labels, position_ids.

    With `document_mask` positions restart at every document and the first token of each, which
    nothing before it can predict, is not trained. transformers keeps attention inside documents
    where positions restart, provided that no attention mask and no cache is given. Without it
    a row is one text. Padding is a document of its own and never trained.
    """

    def __init__(self, document_mask: bool) -> None:
        self.document_mask = document_mask

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, UNK_ID),
            "labels": torch.full(shape, chat.IGNORE),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
        }
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            labels = row["labels"] if "labels" in row else row["input_ids"]
            batch["input_ids"][index, :size] = torch.tensor(row["input_ids"])
            batch["labels"][index, :size] = torch.tensor(labels)
            pieces = row["lengths"] if self.document_mask else [size]
            start = 0
            for length in [*pieces, longest - size]:
                batch["position_ids"][index, start : start + length] = torch.arange(length)
                if length:
                    batch["labels"][index, start] = chat.IGNORE
                start += length
        return batch
