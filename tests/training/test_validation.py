"""How validation losses are combined; test_train.py compares them with the plain model."""

import math
from pathlib import Path

import datasets
import pytest

from chatglm_ja.data import dataset
from chatglm_ja.errors import DataError
from chatglm_ja.training import validation
from chatglm_ja.training.validation import Validation


def test_languages_and_the_whole_are_means_over_tokens() -> None:
    titles = ("ja/a", "ja/b", "zh/a", "en/none")
    scored = Validation(datasets.Dataset.from_dict({}), titles, {"ja": 50})
    metrics = scored.metrics([10.0, 20.0, 9.0, 0.0], [5.0, 5.0, 3.0, 0.0])
    assert metrics["eval_ja_loss"] == 3.0
    assert metrics["eval_ja_bits_per_char"] == pytest.approx(30 / math.log(2) / 50)
    assert metrics["eval_zh_loss"] == 3.0
    assert metrics["source_ja/a_loss"] == 2.0
    assert metrics["source_ja/b_loss"] == 4.0
    assert metrics["source_ja/b_tokens"] == 5
    assert metrics["validation_loss"] == 3.0
    assert not [name for name in metrics if "en" in name.split("_")[1].split("/")]


def test_sources_of_one_name_count_as_one() -> None:
    """As two files of one name in two folders."""
    scored = Validation(datasets.Dataset.from_dict({}), ("ja/a", "zh/b", "ja/a"), {"ja": 100})
    metrics = scored.metrics([100.0, 1.0, 50.0], [20.0, 1.0, 30.0])
    assert metrics["eval_ja_loss"] == metrics["source_ja/a_loss"] == 3.0
    assert metrics["eval_ja_bits_per_char"] == pytest.approx(150 / math.log(2) / 100)
    assert metrics["source_ja/a_tokens"] == 50
    assert metrics["validation_loss"] == pytest.approx(151 / 51)


def test_nothing_scored_is_no_loss() -> None:
    assert Validation(datasets.Dataset.from_dict({}), ("ja/a",), {}).metrics([0.0], [0.0]) == {}


def test_every_token_has_the_source_of_its_document() -> None:
    rows = [{"sources": [2, 0], "lengths": [1, 2]}, {"sources": [1], "lengths": [2]}]
    assert validation.token_sources(rows, 4).tolist() == [[2, 0, 0, 0], [1, 1, 0, 0]]


def test_data_without_a_manifest_names_no_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no manifest that names its sources"):
        dataset.source_titles(tmp_path, "sft")
