"""Translation: prompts as written, chrF as sacrebleu has it, bad files in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from sacrebleu import sentence_chrf

import constants
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.evaluation import translation
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.evaluation.translation import Direction
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import Answer
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.sources import Source
from tests.conftest import DATA, demo_texts


@pytest.fixture
def direction() -> Direction:
    pairs = [("a", "甲"), ("bb", "乙乙"), ("ccc", "丙丙丙"), ("dd", "丁丁"), ("eeee", "戊戊戊戊"),
             ("fffff", "己己己己己")]  # fmt: skip
    return Direction("zh", "English", "Chinese", pairs)


def test_a_prompt_is_plain_text(direction: Direction) -> None:
    assert translation.make_prompt(direction, "eeee", 0) == "English: eeee\nChinese:"
    assert translation.make_prompt(direction, "eeee", 2) == (
        "English: a\nChinese: 甲\nEnglish: bb\nChinese: 乙乙\nEnglish: eeee\nChinese:"
    )


def test_chrf_of_the_first_line(
    model: LoadedModel, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["戊戊戊", "己己己己己\nEnglish: g", "", "戊戊戊戊"]  # two lines, without, with examples

    def answer(model: Any, prompts: Any, limit: int, **options: Any) -> list[Answer]:
        texts = [model.tokenizer.decode(prompt) for prompt in prompts]
        assert [text.count("English:") for text in texts] == [1, 1, 5, 5]
        assert model.tokenizer.decode(options["stop_ids"][-1:]) == "\n"
        return [Answer(text, 1, stopped=True) for text in said]

    monkeypatch.setattr(generation, "generate_answers", answer)
    baseline = Baseline()
    zero, four = translation.measure_translations(model, [direction], baseline, 4)
    expected = [
        sentence_chrf(text, [reference]).score
        for text, reference in zip(
            ["戊戊戊", "己己己己己", "", "戊戊戊戊"],
            ["戊戊戊戊", "己己己己己"] * 2,
            strict=True,
        )
    ]
    assert zero["mean"] == pytest.approx(sum(expected[:2]) / 2)
    assert four["mean"] == pytest.approx(sum(expected[2:]) / 2)
    assert (zero["direction"], zero["shots"], four["shots"]) == ("English > Chinese", 0, 4)
    assert zero["example"] == {"source": "eeee", "reference": "戊戊戊戊", "text": "戊戊戊"}
    again, _ = translation.measure_translations(model, [direction], baseline, 4)
    assert (again["change"], again["p"]) == (0, 1)


def test_a_model_translates_to_the_end_of_a_line(model: LoadedModel, direction: Direction) -> None:
    row, _ = translation.measure_translations(model, [direction], Baseline(), 4)
    assert 0 <= row["mean"] <= 100
    assert "\n" not in row["example"]["text"]


@pytest.mark.parametrize("source", constants.HELD_OUT_PARALLEL, ids=lambda source: source.name)
def test_the_demos_translations(source: Source) -> None:
    (direction,) = translation.read_directions([source], SourceReader(), 36)
    assert f"{direction.source}>{direction.target}" == source.name
    lengths = [len(a) + len(b) for a, b in direction.pairs]
    assert lengths == sorted(lengths)
    # No page that is trained on has a line of them.
    trained = {line for text in demo_texts(source.language, 9999) for line in text.split("\n")}
    assert not trained & {translated for _, translated in direction.pairs}


def test_bad_translations_are_one_line(tmp_path: Path) -> None:
    path = DATA / "heldout_parallel.jsonl.gz"
    reader = SourceReader()
    with pytest.raises(ConfigError, match="names no columns: expected LANGUAGE=FILE#FROM>TO"):
        translation.read_directions([Source("ja", str(path))], reader, 4)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"a": f"{n}", "b": "x"}) + "\n" for n in range(7)))
    with pytest.raises(DataError, match="ja/few holds 7 pairs of single lines: expected 8, 4 of"):
        translation.read_directions([Source("ja", str(few), columns="a>b")], reader, 4)
