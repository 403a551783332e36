"""Probes: answered from their text alone, the same for every stage, and measured in tokens."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from chatglm_ja.evaluation import probes
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.multiple_choice import ChoiceQuestion
from chatglm_ja.evaluation.paired import Baseline, is_measurable
from chatglm_ja.evaluation.probes import Probe
from chatglm_ja.inference.models import LoadedModel
from tests.conftest import demo_texts


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {language: demo_texts(language, 25, "heldout") for language in ("ja", "zh", "en")}


@pytest.fixture(scope="module")
def built(texts: dict[str, list[str]], model: LoadedModel) -> list[Probe]:
    return probes.build_probes(texts, model.tokenizer, 512)


def solve(question: ChoiceQuestion) -> int:
    """Answer as a reader would: find how the examples of the text continue."""
    *lines, asked = question.text.split("\n")
    if not asked:  # repeat
        return question.choices.index("".join(lines[-1:]))
    if asked.endswith(":"):  # recall
        values = {line.partition(":")[2] for line in lines if line.startswith(asked)}
        return next(n for n, choice in enumerate(question.choices) if choice in values)
    left, right = zip(*(line.split(" -> ") for line in lines), strict=True)
    own = asked.removesuffix(" ->")
    if len(right[0]) == 1:  # labels: the line most like this one, by its characters

        def likeness(line: str) -> int:
            return sum((Counter(map(script, line)) & Counter(map(script, own))).values())

        label = right[max(range(len(left)), key=lambda n: likeness(left[n]))]
        return question.choices.index(f" {label}")
    order = 1 if left == right else -1
    return question.choices.index(f" {' '.join(own.split(' ')[::order])}")


def script(character: str) -> str:
    code = ord(character)
    return "kana" if 0x3041 <= code <= 0x30FF else "han" if code > 0x3FFF else "latin"


class ReadingScorer:
    """In place of a model: finds the answer that `solve` gives in the last `memory` characters."""

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def score_continuations(
        self, questions: Sequence[tuple[str, Sequence[str]]], title: str
    ) -> list[list[float]]:
        scores = []
        for text, choices in questions:
            nats = [float(len(choice)) for choice in choices]
            if len(text) > 1:
                lines = text[-self.memory :].split("\n")
                seen = "\n".join(lines[len(text) > self.memory :])
                with contextlib.suppress(StopIteration, ValueError):  # not in what it still sees
                    nats[solve(ChoiceQuestion(seen, tuple(choices), 0))] *= 0.1
            scores.append(nats)
        return scores


def test_every_language_has_every_probe(built: list[Probe]) -> None:
    names = ["copy", "reverse", "labels", "recall 256", "recall 512", "repeat"]
    assert [(p.language, p.name) for p in built] == [
        (language, name) for language in ("ja", "zh", "en") for name in names
    ]
    for probe in built:
        assert len(probe.questions) == probes.CONTEXTS * probes.QUESTIONS


def test_the_answer_is_in_the_text(built: list[Probe]) -> None:
    for probe in built:
        right = [solve(question) == question.answer for question in probe.questions]
        # A line of a manual may be mostly commands in Latin letters.
        assert sum(right) / len(right) >= (0.7 if probe.name == "labels" else 1.0), probe.name


def test_nothing_but_the_text_gives_the_answer_away(built: list[Probe]) -> None:
    """Neither its place nor its length does."""
    for probe in built:
        if probe.name == "repeat":  # its only choice is right
            continue
        chance = 1 / len(probe.questions[0].choices)
        questions = probe.questions
        for guess in (
            [0] * len(questions),
            [min(range(len(q.choices)), key=lambda n: len(q.choices[n])) for q in questions],
        ):
            share = sum(g == q.answer for g, q in zip(guess, questions, strict=True))
            assert share / len(questions) < chance + 0.3
        for question in questions:
            assert len(set(question.choices)) == len(question.choices)


def test_contexts_fill_their_length(built: list[Probe], model: LoadedModel) -> None:
    tokenizer = model.tokenizer
    for probe in built:
        if not probe.name.startswith("recall"):
            continue
        size = int(probe.name.split()[1])
        for question in probe.questions:
            for choice in question.choices:
                length = len(tokenizer.prefix) + len(tokenizer.encode(question.text + choice))
                assert 0.65 * size < length <= size
            # Several questions are asked about one context, none twice.
        assert len({q.text for q in probe.questions}) == len(probe.questions)
        assert len({q.text.rpartition("\n")[0] for q in probe.questions}) == probes.CONTEXTS


def test_the_window_and_the_words_limit_the_lengths(
    texts: dict[str, list[str]], model: LoadedModel
) -> None:
    def names(texts: dict[str, list[str]], window: int) -> list[str]:
        return [probe.name for probe in probes.build_probes(texts, model.tokenizer, window)]

    one = {"zh": texts["zh"]}
    # labels need a second language
    assert names(one, 300) == ["copy", "reverse", "recall 256", "repeat"]
    assert names(one, 255) == ["copy", "reverse", "repeat"]
    assert names(one, 16) == ["copy", "reverse"]
    few = {"zh": ["".join(texts["zh"])[:600]]}
    assert "recall 2048" not in names(few, 2048)
    assert names({"zh": ["好"]}, 300) == []


def test_a_model_that_forgets_is_caught_at_the_length_it_forgets(built: list[Probe]) -> None:
    """Damage that the probes are made for: what lies far back is lost, the rest is not."""
    baseline = Baseline()
    good: Any = ReadingScorer(10_000)
    for row in probes.score_probes(good, built, baseline):
        assert row["mean"] >= {"labels": 0.7, "repeat": 0.89}.get(row["probe"], 1)
        assert row["change"] is None
    bad: Any = ReadingScorer(120)
    rows = {(r["language"], r["probe"]): r for r in probes.score_probes(bad, built, baseline)}
    for language in ("ja", "zh", "en"):
        forgotten = rows[language, "recall 512"]
        assert forgotten["mean"] < 0.75
        assert is_measurable(forgotten)
        assert not is_measurable(rows[language, "copy"])


def test_a_real_model_is_scored_on_the_gain(built: list[Probe], model: LoadedModel) -> None:
    """Against one question by hand."""
    probe = next(p for p in built if p.name == "recall 256")
    part = Probe(probe.language, probe.name, probe.questions[:3])
    (row,) = probes.score_probes(Scorer(model, 512, 4), [part], Baseline())
    right = 0
    for question in part.questions:
        ((given,), (alone,)) = (
            Scorer(model, 512, 4).score_continuations([(text, question.choices)])
            for text in (question.text, question.text[-1])
        )
        gains = [a - b for a, b in zip(given, alone, strict=True)]
        right += gains.index(min(gains)) == question.answer
    assert row["mean"] == right / 3
    assert row["chance"] == 0.25


def test_repeat_is_the_share_of_bits_saved(built: list[Probe], model: LoadedModel) -> None:
    """Against the same passages scored as texts; a model that forgets them at once saves none."""
    probe = next(p for p in built if p.name == "repeat")
    part = Probe(probe.language, probe.name, probe.questions[:3], probe.metric)
    scorer = Scorer(model, 512, 4)
    (row,) = probes.score_probes(scorer, [part], Baseline())
    shares = []
    for question in part.questions:
        (passage,) = question.choices
        assert question.text == f"{passage}\n"
        once, twice, blank, after_blank = (
            scorer.score_texts([text]).nats
            for text in (f"{passage}\n", f"{passage}\n{passage}", "\n", f"\n{passage}")
        )
        shares.append(1 - (twice - once) / (after_blank - blank))
    assert row["mean"] == pytest.approx(sum(shares) / 3, abs=1e-4)
    assert row["chance"] == 0
    baseline = Baseline()
    good: Any = ReadingScorer(10_000)
    bad: Any = ReadingScorer(30)
    probes.score_probes(good, [probe], baseline)
    (row,) = probes.score_probes(bad, [probe], baseline)
    assert row["mean"] == 0
    assert is_measurable(row)
