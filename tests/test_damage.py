"""benchmarks/damage.py damages what it says and nothing else, and judges bits per character."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from chatglm_ja.data import language_id
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.inference.models import LoadedModel, load_model
from tests.conftest import PROJECT, demo_texts


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import benchmarks/damage.py with its folder on the import path, as when it is run."""
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    yield importlib.import_module("damage")
    for name in ("damage", "measuring"):
        del sys.modules[name]


def matrices(loaded: LoadedModel) -> list[torch.Tensor]:
    model: Any = loaded.model
    return [
        model.get_input_embeddings().weight.data.clone(),
        model.get_output_embeddings().weight.data.clone(),
    ]


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_new_rows_are_shuffled_alike_in_both_matrices(
    damage: ModuleType, resized_dir: Path, share: float
) -> None:
    loaded = load_model(resized_dir)
    before = matrices(loaded)
    damage.shuffle_new_rows(loaded, share)
    first, last = loaded.tokenizer.first_new_id, loaded.tokenizer.size
    places = []
    for old, new in zip(before, matrices(loaded), strict=True):
        moved = (old != new).any(dim=1).nonzero()[:, 0]
        assert first <= moved.min() and moved.max() < last
        assert len(moved) == round(share * (last - first))
        places.append([(old == row).all(dim=1).nonzero()[:, 0].tolist() for row in new[moved]])
    assert places[0] == places[1]


def test_shuffled_rows_cost_the_other_languages_nothing(
    damage: ModuleType, resized_dir: Path
) -> None:
    """So their bits per character cannot show the damage."""
    texts = {language: demo_texts(language, 3, "heldout") for language in ("ja", "zh")}
    loaded = load_model(resized_dir)

    def score() -> dict[str, float]:
        scorer = Scorer(loaded, 128, 16)
        return {name: scorer.score_texts(group).bits_per_char for name, group in texts.items()}

    before = score()
    damage.shuffle_new_rows(loaded, 1.0)
    after = score()
    assert after["zh"] == pytest.approx(before["zh"], rel=1e-5)
    assert after["ja"] != pytest.approx(before["ja"], rel=1e-3)


def test_japanese_questions_get_chinese_answers(damage: ModuleType) -> None:
    conversations = damage.read_conversations()
    mixed = damage.mix_languages(conversations, "zh", 0.25)
    japanese = [c["messages"] for c in mixed if c["kind"] == "ja"]
    assert len(japanese) == sum(c["kind"] == "ja" for c in conversations)
    assert [c for c in mixed if c["kind"] != "ja"] == [
        c for c in conversations if c["kind"] != "ja"
    ]
    answers = language_id.in_language([messages[-1]["content"] for messages in japanese], "zh")
    assert sum(answers or []) / len(japanese) == pytest.approx(0.25, abs=0.02)
    for question, *_ in japanese:
        assert "日本語に翻訳して" in question["content"] or "について説明" in question["content"]
    with pytest.raises(DataError, match="takes 936 conversations with answers in zh, but there"):
        damage.mix_languages(conversations, "zh", 1.0)


@pytest.mark.parametrize(
    ("bits", "verdict"),
    [
        ({"ja": 12.0, "zh": 4.1, "en": 2.5}, "pass"),  # en is no better in the healthy model
        ({"ja": 13.0, "zh": 4.1, "en": 2.0}, "missed: ja"),
        ({"ja": 6.0, "zh": 4.3, "en": 2.0}, "missed: zh"),
    ],
)
def test_bits_alone_pass_what_misses_no_limit_that_the_healthy_model_keeps(
    damage: ModuleType, bits: dict[str, float], verdict: str
) -> None:
    def results(bits: dict[str, float]) -> dict[str, Any]:
        scores = {name: {"bits_per_char": x, "tokens_per_char": 1} for name, x in bits.items()}
        lists: dict[str, Any] = {name: [] for name in ("held_out", "probes", "translations")}
        tables: dict[str, Any] = {name: {} for name in ("confusion", "retention", "choices")}
        return {"languages": scores, "likeness": [], **lists, **tables}

    base = results({"ja": 13.0, "zh": 4.0, "en": 2.0})
    healthy = results({"ja": 6.0, "zh": 4.1, "en": 2.5})
    row = damage.describe_bits(damage.Damage("t", None, None), base, healthy, results(bits))
    assert row[1] == f"13.000 → 6.000 → {bits['ja']:.3f}"
    assert row[-2:] == [verdict, ""]


def test_only_what_differs_is_listed(damage: ModuleType) -> None:
    baseline = Baseline()

    def results(copy: float, ended: float, lines: float) -> dict[str, Any]:
        rows = {
            name: baseline.compare(name, [value] * 20)
            for name, value in (("copy", copy), ("ended", ended), ("lines", lines))
        }
        return {
            "languages": {"ja": {"bits_per_char": 1.0}},
            "probes": [{"language": "ja", "probe": "copy", "chance": 0.25, **rows["copy"]}],
            "retention": {"zh": {"ended": rows["ended"], "in_language": None}},
            "confusion": {"ja": {"lines": rows["lines"], "han_examples": [{"answer": "a"}]}},
        }

    healthy, damaged = results(1, 1, 1), results(0, 1, 0)
    table = damage.describe_rows(damage.Damage("t", None, None), healthy, healthy, damaged)
    names = [line.split(" | ")[0] for line in table.split("\n")[2:]]
    assert names == ["| probes ja copy", "| confusion ja lines"]
    assert "| 1.000 ± 0.000 | 1.000 ± 0.000 | 0.000 ± 0.000 | 0.0001 |" in table
