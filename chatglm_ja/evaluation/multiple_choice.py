"""Multiple choice by log-likelihood: which of some continuations does the model find likeliest?

A record is a question, text and choices verbatim: the model reads them joined, so a space or line
break between them belongs to one of the two.

    {"question": "日本の首都は", "choices": ["東京です。", "大阪です。"], "answer": 0}

A long choice is less likely than a short one, and a common one likelier than a rare one. So the
choices are compared in three ways, the first two of which lm-evaluation-harness has too:

    acc         log P(choice | question)
    acc_norm    the same per character of the choice
    acc_gain    what the question adds to it: less log P(choice | the question's last character),
                which leaves the choice's beginning to the same pieces (Brown et al. 2020, arXiv
                2005.14165, section 2.4, normalise by a context of "Answer: ")
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatglm_ja.data.readers import (
    Record,
    Reject,
    check_characters,
    read_chunks,
    read_records,
    reject_error,
)
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation import likelihood
from chatglm_ja.sources import Source

METRICS = ("acc", "acc_norm", "acc_gain")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A text, what may follow it, and which of that is right, from 0."""

    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(sources: Iterable[Source]) -> dict[str, list[ChoiceQuestion]]:
    """The questions by language. DataError for a source without any, or with a bad one."""
    questions: dict[str, list[ChoiceQuestion]] = {}
    for source in sources:
        found = []
        for chunk in read_chunks(source):
            for number, record in read_records(chunk, source):
                question = record if isinstance(record, Reject) else _question(record)
                if isinstance(question, Reject):
                    raise reject_error(chunk.file, number, question)
                found.append(question)
        if not found:
            raise DataError(f"source {source.title} holds no question: expected multiple choice")
        questions.setdefault(source.language, []).extend(found)
    return questions


def _question(record: Record) -> ChoiceQuestion | Reject:
    text, choices, answer = (record.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(text, str) or not text:
        return Reject("no question", f"expected text in 'question', found {text!r}")
    if (
        not isinstance(choices, list)
        or not all(isinstance(choice, str) and choice for choice in choices)
        or len(set(choices)) < max(2, len(choices))
    ):
        return Reject("no choices", "expected a list of two or more different texts in 'choices'")
    if type(answer) is not int or not 0 <= answer < len(choices):
        return Reject(
            "no answer", f"expected 0 to {len(choices) - 1}, the right choice, found {answer!r}"
        )
    for part in (text, *choices):
        if reject := check_characters(part):
            return reject
    return ChoiceQuestion(text, tuple(choices), answer)


def score_questions(
    model: Any,
    encoder: Any,
    questions: Mapping[str, Sequence[ChoiceQuestion]],
    window: int,
    batch_size: int,
    *,
    title: str = "choices",
) -> dict[str, dict[str, float]]:
    """For every language: how many `questions`, the share that `chance` gets right, and the share
    that the model does, in each of WAYS."""
    asked = [
        (text, question.choices)
        for of_language in questions.values()
        for question in of_language
        for text in (question.text, question.text[-1])
    ]
    nats = iter(
        likelihood.score_continuations(model, encoder, asked, window, batch_size, title=title)
    )
    rows = {}
    for language, of_language in questions.items():
        right = dict.fromkeys(METRICS, 0)
        for question in of_language:
            given, alone = next(nats), next(nats)
            costs = {
                "acc": given,
                "acc_norm": [c / len(t) for c, t in zip(given, question.choices, strict=True)],
                "acc_gain": [c - a for c, a in zip(given, alone, strict=True)],
            }
            for way in METRICS:
                right[way] += costs[way].index(min(costs[way])) == question.answer
        count = len(of_language)
        rows[language] = {
            "questions": count,
            "chance": sum(1 / len(question.choices) for question in of_language) / count,
            **{way: right[way] / count for way in METRICS},
        }
    return rows
