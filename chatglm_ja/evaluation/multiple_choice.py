"""Multiple choice by log-likelihood: which of several continuations does a model find likeliest?

A record is a question with its choices. The model reads the question and a choice joined verbatim:
put a space or line break between them at the end of the question or the start of the choice.

    {"question": "日本の首都は", "choices": ["東京です。", "大阪です。"], "answer": 0}

A long choice is less likely than a short one, and a common one likelier than a rare one. So METRICS
compare the choices in several ways, by their costs in nats; the cheapest choice is the answer. The
first two are lm-evaluation-harness's too:

    acc         -log P(choice | question)
    acc_norm    the same per character of the choice
    acc_gain    acc's cost minus -log P(choice | the question's last character): what the question
                adds. The character is kept so that the choice is tokenized the same way in both
                (Brown et al. 2020, arXiv 2005.14165, section 2.4, use a context "Answer: ")
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatglm_ja.data import cleaning
from chatglm_ja.data.readers import Record, Reject, check_characters
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.sources import Source


@dataclass(frozen=True)
class ChoiceMetric:
    """A way to compare choices: its title in reports, and the cost of a choice.

    `cost` takes the choice, and its nats after the question and after its last character only.
    """

    title: str
    cost: Callable[[str, float, float], float]


METRICS = {
    "acc": ChoiceMetric("likeliest", lambda choice, nats, alone: nats),
    "acc_norm": ChoiceMetric("per character", lambda choice, nats, alone: nats / len(choice)),
    "acc_gain": ChoiceMetric(
        "gains most by the question", lambda choice, nats, alone: nats - alone
    ),
}


@dataclass(frozen=True)
class ChoiceQuestion:
    """A text, its possible continuations, and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(
    sources: Iterable[Source], reader: SourceReader, shots: int = 0
) -> dict[str, list[ChoiceQuestion]]:
    """Read the questions by language, each after `shots` examples from its own source.

    Raises DataError for a source with none, and for one with too few for the examples.
    """
    questions: dict[str, list[ChoiceQuestion]] = {}
    parse = functools.partial(_parse_question, unicode_form=reader.unicode_form)
    for source in sources:
        own = list(reader.records(source, parse))
        if not own:
            raise DataError(f"source {source.title} holds no question: expected multiple choice")
        try:
            own = add_examples(own, shots)
        except ValueError:
            raise DataError(
                f"source {source.title} has {len(own)} questions, too few for --choices-shots "
                f"{shots}: expected that many others beside each question"
            ) from None
        questions.setdefault(source.language, []).extend(own)
    return questions


def add_examples(questions: Sequence[ChoiceQuestion], shots: int) -> list[ChoiceQuestion]:
    """Return the questions, each after `shots` others with their right choices.

    The examples are the questions that follow it, and after the last one the first; an empty line
    ends each. A question that asks the same is passed over. Raises ValueError if there are too few.
    """
    extended = []
    for place, question in enumerate(questions):
        others = itertools.chain(
            itertools.islice(questions, place + 1, None), itertools.islice(questions, place)
        )
        examples = list(itertools.islice((q for q in others if q.text != question.text), shots))
        if len(examples) < shots:
            raise ValueError(f"{len(examples)} examples, expected {shots}")
        before = "".join(f"{q.text}{q.choices[q.answer]}\n\n" for q in examples)
        extended.append(dataclasses.replace(question, text=before + question.text))
    return extended


def _parse_question(record: Record, unicode_form: str) -> ChoiceQuestion | Reject:
    text, choices, answer = (record.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(text, str) or not text:
        return Reject("no question", f"expected text in 'question', found {text!r}")
    parts = [part for part in choices if isinstance(part, str)] if isinstance(choices, list) else []
    # Characters alone are cleaned: the blank between a question and a choice belongs to them.
    cleaned = [
        cleaning.clean_characters(part, unicode_form) for part in parts if isinstance(part, str)
    ]
    if not all(cleaned) or not 2 <= len(set(cleaned)) == len(parts):
        return Reject("no choices", "expected a list of two or more different texts in 'choices'")
    if type(answer) is not int or not 0 <= answer < len(cleaned):
        return Reject(
            "no answer", f"expected 0 to {len(cleaned) - 1}, the right choice, found {answer!r}"
        )
    for part in (text, *parts):
        if reject := check_characters(part):
            return reject
    return ChoiceQuestion(cleaning.clean_characters(text, unicode_form), tuple(cleaned), answer)


def judge_questions(
    scorer: Scorer,
    questions: Sequence[ChoiceQuestion],
    metrics: Iterable[str] = METRICS,
    title: str = "choices",
) -> dict[str, list[float]]:
    """Return for each of the metrics whether each question is answered rightly: 1 or 0."""
    texts = [(question.text, question.choices) for question in questions]
    nats = scorer.score_continuations(texts, title)
    alone = [[0.0] * len(question.choices) for question in questions]
    if "acc_gain" in metrics:
        texts = [(text[-1], choices) for text, choices in texts]
        alone = scorer.score_continuations(texts, title)
    right: dict[str, list[float]] = {name: [] for name in metrics}
    for question, *costs in zip(questions, nats, alone, strict=True):
        scored = list(zip(question.choices, *costs, strict=True))
        for name in right:
            values = [METRICS[name].cost(*choice) for choice in scored]
            right[name].append(float(values.index(min(values)) == question.answer))
    return right


def chance(questions: Sequence[ChoiceQuestion]) -> float:
    """Return the share of right answers of a guess."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)


def score_questions(
    scorer: Scorer,
    questions: Mapping[str, Sequence[ChoiceQuestion]],
    baseline: Baseline,
    title: str = "choices",
) -> dict[str, dict[str, Any]]:
    """Return for every language the number of `questions` and the shares of right answers.

    The shares are that of `chance`, and the model's by each of METRICS; `compared` has them as
    Baseline.compare gives them.
    """
    rows = {}
    for language, group in questions.items():
        right = judge_questions(scorer, group, title=f"{title} {language}")
        compared = {
            name: baseline.compare(("choices", language, name), values)
            for name, values in right.items()
        }
        rows[language] = {
            "questions": len(group),
            "chance": chance(group),
            **{name: row["mean"] for name, row in compared.items()},
            "compared": compared,
        }
    return rows
