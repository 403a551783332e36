"""Step 4's data sets as training reads them: memory-mapped, checked, collated."""

from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch

from chatglm_ja.bases.shape import read_shape
from chatglm_ja.data import dataset
from chatglm_ja.errors import DataError
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.training.model import Collator
from tests.conftest import DATA, Source, prepare_config, write_pretraining


def test_shards_are_one_data_set_and_not_copied(
    tmp_path: Path, merged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("ja", str(DATA / "train_ja.jsonl.gz"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = prepare_config(merged_dir, [source], total_tokens=40_000, block_size=64)
    for folder in (whole, parts):
        folder.mkdir()
        write_pretraining(folder, config)
        monkeypatch.setattr(dataset, "SHARD_TOKENS", 9_000)
    assert len(list(parts.glob("pretrain_train-*-of-00005.arrow"))) == 5
    allocated = pyarrow.total_allocated_bytes()
    rows = dataset.load_rows(parts, "pretrain", "train")
    assert pyarrow.total_allocated_bytes() - allocated < 20_000
    assert rows[:] == dataset.load_rows(whole, "pretrain", "train")[:]
    assert str(rows.features["input_ids"].feature) == "Value('int32')"


def test_collator_restarts_positions_and_trains_no_first_token() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "lengths": [3, 2]},
        {"input_ids": [1, 2, 3], "lengths": [3]},
    ]
    batch = Collator(document_mask=True)(rows)
    ignore = IGNORE_INDEX
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[ignore, 6, 7, ignore, 9], [ignore, 2, 3, ignore, ignore]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]
    plain = Collator(document_mask=False)(rows[:1])
    assert "position_ids" not in plain  # without restarts, those that the model makes
    assert plain["labels"].tolist() == [[ignore, 6, 7, 8, 9]]
    assert plain["input_ids"].dtype == torch.int64
    assert [batch["trained"].tolist(), plain["trained"].tolist()] == [[0, 1, 3, 5, 6], [0, 1, 2, 3]]


def test_rows_are_padded_to_a_length(data_dir: Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "lengths": [3]}]
    batch = Collator(document_mask=True, length=5)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX, IGNORE_INDEX]]


def test_rows_that_do_not_fit_are_refused(data_dir: Path, resized_dir: Path) -> None:
    rows = dataset.load_rows(data_dir, "pretrain", "train")
    largest = max(max(ids) for ids in rows["input_ids"])
    shape = replace(read_shape(resized_dir), rows=largest + 1, positions=64)
    dataset.check_rows(rows, 64, shape, data_dir, "pretrain")
    with pytest.raises(DataError, match=f"token id {largest}, but the model has {largest} embed"):
        dataset.check_rows(rows, 64, replace(shape, rows=largest), data_dir, "pretrain")
    with pytest.raises(DataError, match="longest row has 64 tokens, but --block-size is 63"):
        dataset.check_rows(rows, 63, shape, data_dir, "pretrain")
    with pytest.raises(
        DataError, match=r"64 tokens \(row 1, of ../train_..\), but the model reads at most 63"
    ):
        dataset.check_rows(rows, 64, replace(shape, positions=63), data_dir, "pretrain")


@pytest.mark.parametrize(("name", "split"), [("pretrain", "validation"), ("sft", "train")])
def test_unpacked_rows_are_single_documents(data_dir: Path, name: str, split: str) -> None:
    rows = dataset.load_rows(data_dir, name, split)
    allocated = pyarrow.total_allocated_bytes()
    apart = dataset.unpack_rows(rows)
    tokens = sum(map(sum, rows["lengths"]))
    assert pyarrow.total_allocated_bytes() - allocated < 4 * tokens
    expected = []
    for row in rows:
        start = 0
        for length, source in zip(row["lengths"], row["sources"], strict=True):
            part = slice(start, start + length)
            one = {"input_ids": row["input_ids"][part], "lengths": [length], "sources": [source]}
            if "labels" in row:
                one["labels"] = row["labels"][part]
            if "language" in row:
                one["language"] = row["language"]
            expected.append(one)
            start += length
    assert len(expected) > len(rows)
    assert list(apart) == expected
    assert apart.features == rows.features


def test_only_answers_are_scored_in_conversations(data_dir: Path) -> None:
    assert dataset.scored_share(dataset.load_rows(data_dir, "pretrain", "train"), 9) == 1.0
    bins = dataset.load_rows(data_dir, "sft", "train")
    labels = torch.tensor([label for row in bins[:2]["labels"] for label in row])
    assert dataset.scored_share(bins, 2) == pytest.approx((labels != IGNORE_INDEX).float().mean())


def test_tokens_are_counted_without_reading_rows(data_dir: Path) -> None:
    for name in ("pretrain", "sft"):
        rows = dataset.load_rows(data_dir, name, "train")
        assert dataset.count_tokens(rows) == sum(map(len, rows["input_ids"]))


def test_blocks_are_appended_to_conversations(data_dir: Path) -> None:
    rows = dataset.load_rows(data_dir, "sft", "train")
    blocks = dataset.load_rows(data_dir, "pretrain", "train")
    files = sorted(data_dir.iterdir())
    both = dataset.append_blocks(rows, blocks)
    assert sorted(data_dir.iterdir()) == files  # nothing is written beside them
    assert both[: len(rows)] == rows[:]
    appended = both[len(rows) :]
    assert appended["labels"] == appended["input_ids"] == blocks[:]["input_ids"]
    assert appended["lengths"] == blocks[:]["lengths"]
