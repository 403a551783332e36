"""Step 4's data sets: shares, split, boundaries, and what a batch trains on."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ja import chat, dataset
from chatglm_ja.config import Source
from chatglm_ja.errors import DataError
from chatglm_ja.tokenizer import EOS_ID
from tests.conftest import DATA


def write_pretraining(folder: Path, encoder: Any, files: dict[str, str], **options: Any) -> Any:
    sources = []
    for label, text in files.items():
        (folder / f"{label}.txt").write_text(text, encoding="utf-8")
        sources.append(Source(label, str(folder / f"{label}.txt")))
    settings: dict[str, Any] = {
        "total_tokens": 100,
        "validation_tokens": 0,
        "max_repeats": 1.0,
        "block_size": 16,
        "num_threads": 1,
    }
    shares = {label: 1 / len(files) for label in files}
    return dataset.write_pretraining(folder, encoder, sources, shares, **settings | options)


def test_blocks_hold_the_documents_with_real_ends(tmp_path: Path, encoder: Any) -> None:
    lines = [f"文書 {i} </s> です。" for i in range(60)]
    counts = write_pretraining(tmp_path, encoder, {"ja": "\n".join(lines)}, total_tokens=200)
    rows = dataset.read(tmp_path, "pretrain", "train")
    stream = [token for ids in rows["input_ids"] for token in ids]
    prefix = chat.prefix_ids(encoder)
    expected = [t for line in lines for t in [*prefix, *encoder.encode(line), EOS_ID]][:200]
    assert stream == expected[: len(stream)]
    assert counts["tail_tokens_dropped"] == 200 - len(stream) < 16
    assert all(sum(lengths) == 16 for lengths in rows["lengths"])
    # A length ends where a document ends, or where the block does.
    for row in rows:
        ends = [row["input_ids"][end - 1] for end in itertools.accumulate(row["lengths"])]
        assert ends[:-1] == [EOS_ID] * (len(ends) - 1)
        assert sum(token == EOS_ID for token in row["input_ids"]) == ends.count(EOS_ID)


def test_shares_are_exact(tmp_path: Path, encoder: Any) -> None:
    """Counted from the blocks: every language has a character of its own."""
    files = {"ja": "あああ。\n" * 900, "zh": "们们们。\n" * 900, "en": "eee.\n" * 900}
    sources = []
    for label, text in files.items():
        (tmp_path / f"{label}.txt").write_text(text, encoding="utf-8")
        sources.append(Source(label, str(tmp_path / f"{label}.txt")))
    shares = {"ja": 0.76, "zh": 0.12, "en": 0.12}
    counts = dataset.write_pretraining(
        tmp_path, encoder, sources, shares, total_tokens=3200, validation_tokens=0,
        max_repeats=1.0, block_size=32, num_threads=1,
    )  # fmt: skip
    assert counts["train_tokens"] == {"ja": 2432, "zh": 384, "en": 384}
    stream = [t for ids in dataset.read(tmp_path, "pretrain", "train")["input_ids"] for t in ids]
    assert len(stream) == 3200
    for label, sample in (("ja", "あああ。"), ("zh", "们们们。"), ("en", "eee.")):
        size = len(encoder.encode(sample)) + 3
        first = encoder.encode(sample)[1]
        per_document = encoder.encode(sample).count(first)
        assert abs(stream.count(first) / per_document * size / 3200 - shares[label]) < 0.01


def test_sft_kinds_have_their_shares(tmp_path: Path, encoder: Any) -> None:
    sources = [
        Source(kind, str(DATA / "train_sft.jsonl.gz"), where=("kind", kind))
        for kind in ("ja", "zh", "en", "code")
    ]
    shares = {"ja": 0.52, "zh": 0.22, "en": 0.09, "code": 0.17}
    counts = dataset.write_sft(
        tmp_path, encoder, sources, shares, examples=200, validation_examples=20,
        max_length=512, seed=0,
    )  # fmt: skip
    assert counts["train_examples"] == {"ja": 104, "zh": 44, "en": 18, "code": 34}
    packed = dataset.read(tmp_path, "sft", "train")["lengths"]
    assert sum(map(len, packed)) == 200


def test_a_conversation_given_twice_is_taken_once(tmp_path: Path, encoder: Any) -> None:
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * 2)
    with pytest.raises(DataError, match=r"0 for train, .*left out: duplicate 1"):
        dataset.write_sft(
            tmp_path, encoder, [Source("ja", str(tmp_path / "a.jsonl"))], {"ja": 1.0},
            examples=1, validation_examples=1, max_length=64, seed=0,
        )  # fmt: skip


def test_validation_rows_say_their_language(data_dir: Path) -> None:
    rows = dataset.read(data_dir, "pretrain", "train")
    assert len(rows) == 8000 // 64
    assert set(dataset.read(data_dir, "pretrain", "validation")["label"]) == {"ja", "zh", "en"}


def test_no_validation_document_is_trained_on(tmp_path: Path, encoder: Any) -> None:
    lines = [f"これは文書番号 {i} です。" for i in range(400)]
    # Every document twice: copies must fall on the same side.
    text = "\n".join(lines + lines)
    write_pretraining(tmp_path, encoder, {"ja": text}, total_tokens=5000, validation_tokens=200)

    def documents(split: str) -> set[tuple[int, ...]]:
        stream = [t for ids in dataset.read(tmp_path, "pretrain", split)["input_ids"] for t in ids]
        parts: list[list[int]] = [[]]
        for token in stream:
            parts[-1].append(token)
            if token == EOS_ID:
                parts.append([])
        return {tuple(part) for part in parts[:-1]}

    validation, train = documents("validation"), documents("train")
    assert len(validation) > 5
    assert not validation & train
    assert len(train) > 200


def test_a_source_that_cannot_fill_its_share_is_an_error(tmp_path: Path, encoder: Any) -> None:
    with pytest.raises(DataError, match=r"ja has .* tokens for a share of 1,000"):
        write_pretraining(tmp_path, encoder, {"ja": "短い"}, total_tokens=1000)


def test_repeats_fill_a_share_up_to_their_limit(tmp_path: Path, encoder: Any) -> None:
    tokens = len(encoder.encode("短い文です。")) + 3
    files = {"ja": "短い文です。"}
    write_pretraining(
        tmp_path, encoder, files, total_tokens=4 * tokens, max_repeats=4.0, block_size=8
    )
    with pytest.raises(DataError, match="raise --max-repeats"):
        write_pretraining(
            tmp_path, encoder, files, total_tokens=5 * tokens, max_repeats=4.0, block_size=8
        )


def test_sft_bins_hold_whole_conversations(data_dir: Path) -> None:
    rows = dataset.read(data_dir, "sft", "train")
    assert sum(len(lengths) for lengths in rows["lengths"]) == 8
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["lengths"]) <= 256
        start = 0
        for length in row["lengths"]:
            ids, labels = row["input_ids"][start:][:length], row["labels"][start:][:length]
            assert ids[-1] == labels[-1] == EOS_ID
            assert labels[0] == chat.IGNORE
            start += length


def test_collator_restarts_positions_and_trains_no_first_token() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "lengths": [3, 2]},
        {"input_ids": [1, 2, 3], "lengths": [3]},
    ]
    batch = dataset.Collator(document_mask=True)(rows)
    ignore = chat.IGNORE
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[ignore, 6, 7, ignore, 9], [ignore, 2, 3, ignore, ignore]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]
    plain = dataset.Collator(document_mask=False)(rows[:1])
    assert plain["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert plain["labels"].tolist() == [[ignore, 6, 7, 8, 9]]
    assert plain["input_ids"].dtype == torch.int64


def test_largest_id(data_dir: Path) -> None:
    rows = dataset.read(data_dir, "pretrain", "train")
    assert dataset.largest_id(rows) == max(max(ids) for ids in rows["input_ids"])
