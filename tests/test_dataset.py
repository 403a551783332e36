"""Step 4's data sets: shares, split, boundaries, and what a batch trains on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ja import chat, dataset
from chatglm_ja.config import Source
from chatglm_ja.errors import DataError
from chatglm_ja.tokenizer import EOS_ID


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
    starts = {token for row in rows for token in [row["input_ids"][row["lengths"][0] % 16]]}
    assert starts <= {prefix[0], *stream}


def test_shares_are_exact(data_dir: Path) -> None:
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
