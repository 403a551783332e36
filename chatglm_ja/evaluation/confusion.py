"""Language confusion: does an answer stay in the language of its question?

Two pass rates of the Language Confusion Benchmark (Marchisio et al. 2024, arXiv 2406.20052):

lines   the share of answers of which every line is in the language
words   of these, the share without a word that is not: an English word in Japanese or Chinese text,
        or a word in letters that the language is not written in

A line counts from MIN_BYTES of letters on. Kana tell Japanese from Chinese better than a trained
identifier does: of the demo's 651 held-out Chinese sentences, data/language_id.py takes 98.9% for
Chinese, py3langid 92.3%, fastText's lid.176.ftz 90.3%. Every other language needs the identifier.
As in the benchmark, an English word is in lower case, which names are not, and has four letters or
more. Words of the question may come back in the answer.

Han characters outside JIS X 0208 in a Japanese answer are Chinese forms: 设置 for 設定.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from chatglm_ja.data import language_id
from chatglm_ja.errors import ConfigError
from chatglm_ja.evaluation.paired import Baseline

MIN_BYTES = 24  # of the letters of a line: eight kana or Han characters, four or five English words

_NOT_LETTERS = re.compile(r"[\W\d_]+")
_ENGLISH = re.compile(r"(?<![A-Za-z])[a-z]{4,}(?![A-Za-z])")
_KANA = "\u3041-\u3096\u30a1-\u30fa\u30fc"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_OTHERS = "\u0400-\u052f\u0590-\u07ff\u0900-\u0dff\u0e00-\u0fff\u1100-\u11ff\uac00-\ud7af"
# The words that text of a language does not have.
_FOREIGN_WORDS = {
    "ja": [_ENGLISH, re.compile(f"[{_OTHERS}]+")],
    "zh": [_ENGLISH, re.compile(f"[{_KANA}{_OTHERS}]+")],
    "en": [re.compile(f"[{_HAN}{_KANA}{_OTHERS}]+")],
}


def check_language(language: str) -> bool:
    """Return whether the lines of a language can be told.

    Raises ConfigError if that needs the identifier, and the package is missing.
    """
    return language in _BY_LETTERS or language in _load_identifier().labels


def measure_confusion(
    kind: str, questions: Sequence[str], answers: Sequence[str], baseline: Baseline
) -> dict[str, Any]:
    """Measure answers that are to be in the language `kind`, compared with the base's.

    Returns `lines` and `words` as Baseline.compare gives them (`words` is None for a language whose
    foreign words are not known), and for Japanese `other_han`, and `han_examples`: the question,
    the answer and its Han characters outside JIS X 0208.
    """
    # An answer without a line to judge says nothing; one in another language, nothing of words.
    judged = [long_lines(text) for text in answers]
    lines = [
        float(all(is_line_in(line, kind) for line in own)) if own else math.nan for own in judged
    ]
    row: dict[str, Any] = {"lines": baseline.compare(("lines", kind), lines), "words": None}
    if kind in _FOREIGN_WORDS:
        words = [
            float(not foreign_words(text, kind, question)) if passed == 1 else math.nan
            for passed, text, question in zip(lines, answers, questions, strict=True)
        ]
        row["words"] = baseline.compare(("words", kind), words)
    row["other_han"], row["han_examples"] = None, []
    if kind == "ja":
        found = [other_han(text) for text in answers]
        row["other_han"] = baseline.compare(("other_han", kind), [float(bool(x)) for x in found])
        row["han_examples"] = [
            {"question": question, "answer": text, "characters": characters}
            for question, text, characters in zip(questions, answers, found, strict=True)
            if characters
        ]
    return row


def long_lines(text: str) -> list[str]:
    """Return the lines that have letters enough to tell their language."""
    return [
        line
        for line in text.split("\n")
        if len(_NOT_LETTERS.sub("", line).encode(errors="replace")) >= MIN_BYTES
    ]


def is_line_in(line: str, language: str) -> bool:
    """Return whether a line is written in a language that `check_language` accepts."""
    fits = language_id.in_language([line], language)
    if fits is not None and not fits[0]:
        return False
    return language in _BY_LETTERS or str(_load_identifier().classify(line)[0]) == language


def foreign_words(text: str, language: str, question: str = "") -> list[str]:
    """Return the words of a text in `language` that are of another, and not in the question."""
    words = [word for form in _FOREIGN_WORDS[language] for word in form.findall(text)]
    return [word for word in words if word not in question]


def other_han(text: str) -> str:
    """Return the distinct Han characters of a text that are not in JIS X 0208, in order."""
    han = "".join(dict.fromkeys(re.findall(f"[{_HAN}]", text)))
    # Python's shift_jis codec covers JIS X 0208 and no kanji beyond it.
    known = han.encode("shift_jis", errors="ignore").decode("shift_jis")
    return "".join(character for character in han if character not in known)


_BY_LETTERS = ("ja", "zh")


@cache
def _load_identifier() -> Any:
    """Return py3langid's identifier. Raises ConfigError if the package is missing."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:
        raise ConfigError(
            "step 7 tells the language of answers with py3langid, which is not installed: run "
            "`pip install -r requirements.txt`"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE)
