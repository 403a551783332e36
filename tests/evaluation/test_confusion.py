"""Answers that leave their question's language are told, whatever they hold otherwise."""

import sys

import pytest

from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import ConfigError
from chatglm_ja.evaluation import confusion
from chatglm_ja.evaluation.paired import Baseline, is_measurable
from chatglm_ja.sources import Source
from tests.conftest import DATA, demo_texts

LINES = {
    "ja": "表計算ドキュメントでセルを選択します。",
    "zh": "您可以在电子表格文档中选择单元格。",
    "en": "You can select the cells of a spreadsheet.",
    "fr": "Vous pouvez choisir les cellules de la feuille de calcul.",
    "ko": "스프레드시트에서 셀을 선택할 수 있습니다.",
}


@pytest.mark.parametrize("language", LINES)
def test_lines_of_other_languages_do_not_pass(language: str) -> None:
    assert confusion.check_language(language)
    for other, line in LINES.items():
        assert confusion.is_line_in(line, language) == (other == language)


def test_an_unknown_language_is_not_measured() -> None:
    assert not confusion.check_language("tlh")


@pytest.mark.parametrize(("language", "share"), [("ja", 0.97), ("zh", 0.97), ("en", 0.95)])
def test_held_out_lines_pass(language: str, share: float) -> None:
    text = "\n".join(demo_texts(language, 30, "heldout"))
    lines = [line for line in confusion.long_lines(text) if line[-1] in ".。"]
    passed = [confusion.is_line_in(line, language) for line in lines]
    assert sum(passed) / len(passed) >= share


def test_short_lines_say_nothing() -> None:
    assert confusion.long_lines("はい。\n1,234,567,890,123,456,789\nOK") == []
    assert confusion.long_lines(f"OK\n{LINES['ja']}") == [LINES["ja"]]


def test_pass_rates_follow_the_definition() -> None:
    answers = [
        f"{LINES['ja']}\n{LINES['ja']}",
        f"{LINES['ja']}\n{LINES['en']}",  # one line is not
        "表計算 spreadsheet でセルを選択します。",  # one word is not
        "Writer で表計算ドキュメントの example を選択します。",  # a name, a word of the question
        "はい。",
    ]
    questions = ["", "", "", "Write an example.", ""]
    row = confusion.measure_confusion("ja", questions, answers, Baseline())
    assert (row["lines"]["items"], row["lines"]["mean"]) == (4, 0.75)
    assert (row["words"]["items"], row["words"]["mean"]) == (3, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("ja", "セル example 셀 и ABC Name x", ["example", "셀", "и"]),
        ("zh", "单元格 セル example", ["example", "セル"]),
        ("en", "a cell セル 设置 cell", ["セル", "设置"]),
    ],
)
def test_foreign_words(language: str, text: str, words: list[str]) -> None:
    assert confusion.foreign_words(text, language) == words


def test_chinese_forms_are_listed() -> None:
    assert confusion.other_han("设置を設定する设置、込働峠々㐂") == "设㐂"
    answers = ["セルの设置を設定します。", "セルの設定を変えます。"]
    row = confusion.measure_confusion("ja", ["a", "b"], answers, Baseline())
    assert row["other_han"]["mean"] == 0.5
    assert row["han_examples"] == [{"question": "a", "answer": answers[0], "characters": "设"}]
    assert confusion.measure_confusion("zh", ["a"], ["设置"], Baseline())["other_han"] is None


def test_a_model_that_answers_japanese_questions_in_chinese_is_caught() -> None:
    """The base answers in Japanese, the damaged model as fine-tuning on Chinese taught it."""
    answers = {}
    for kind in ("ja", "zh"):
        source = Source(kind, str(DATA / "heldout_sft.jsonl.gz"), where=("kind", kind))
        answers[kind] = [m[-1]["content"] for m in SourceReader().conversations(source)]
    questions = [""] * len(answers["ja"])
    baseline = Baseline()
    good = confusion.measure_confusion("ja", questions, answers["ja"], baseline)
    bad = confusion.measure_confusion("ja", questions, answers["zh"], baseline)
    assert good["lines"]["mean"] > 0.9
    assert bad["lines"]["mean"] < 0.1
    assert is_measurable(bad["lines"])
    assert good["other_han"]["mean"] == 0
    assert bad["other_han"]["mean"] > 0.6
    assert len(bad["han_examples"]) > 15
    assert is_measurable(bad["other_han"])


def test_a_missing_identifier_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    confusion._load_identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    assert confusion.check_language("ja")  # needs none
    with pytest.raises(ConfigError, match="py3langid, which is not installed: run `pip install"):
        confusion.check_language("en")
