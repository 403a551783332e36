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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from chatglm_ja.data import readers
from chatglm_ja.data.readers import Record, Reject, check_characters
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation.likelihood import Scorer
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


def read_questions(sources: Iterable[Source]) -> dict[str, list[ChoiceQuestion]]:
    """Read the questions by language. Raises DataError for an empty source and for a bad record."""
    questions: dict[str, list[ChoiceQuestion]] = {}
    for source in sources:
        own = []
        for chunk in readers.read_chunks(source):
            for number, record in readers.read_records(chunk, source):
                question = record if isinstance(record, Reject) else _parse_question(record)
                if isinstance(question, Reject):
                    raise readers.reject_error(chunk.file, number, question)
                own.append(question)
        if not own:
            raise DataError(f"source {source.title} holds no question: expected multiple choice")
        questions.setdefault(source.language, []).extend(own)
    return questions


def _parse_question(record: Record) -> ChoiceQuestion | Reject:
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
    scorer: Scorer, questions: Mapping[str, Sequence[ChoiceQuestion]], title: str = "choices"
) -> dict[str, dict[str, float]]:
    """Return for every language the number of `questions` and the shares of right answers.

    The shares are that of `chance`, and the model's by each of METRICS.
    """
    pairs = [
        (text, question.choices)
        for group in questions.values()
        for question in group
        for text in (question.text, question.text[-1])
    ]
    nats = iter(scorer.score_continuations(pairs, title))
    rows = {}
    for language, group in questions.items():
        correct = dict.fromkeys(METRICS, 0)
        for question in group:
            scored = list(zip(question.choices, next(nats), next(nats), strict=True))
            for name, metric in METRICS.items():
                costs = [metric.cost(*choice) for choice in scored]
                correct[name] += costs.index(min(costs)) == question.answer
        rows[language] = {
            "questions": len(group),
            "chance": sum(1 / len(question.choices) for question in group) / len(group),
            **{name: count / len(group) for name, count in correct.items()},
        }
    return rows
