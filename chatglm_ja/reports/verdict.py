"""The verdict of step 7: is the model better, and what did it cost?

The last stage is compared with the base, language by language. The new language is the first. What
a measure says is a Finding, and its outcome is one of

gained      better than the base
same        no difference that can be measured
cost        worse than the base, within the limit
missed      outside the limit

The limits are those of LIMITS. A measure on items (see evaluation/paired.py) has none but the base:
worse by more than chance is missed.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from chatglm_ja.reports.eval_tables import CONFUSION, Results, show_number

CHOICE_METRIC = "acc_norm"  # of multiple choice, whose metrics mostly agree
LANGUAGE_NAMES = {"ja": "Japanese", "zh": "Chinese", "en": "English", "code": "Code"}


@dataclass(frozen=True)
class Limits:
    """What a model may cost.

    bits_per_char       how much more bits per character a language may need that the base knew
    same_bits           a change of bits per character that counts as none
    answers             the least share of sampled answers that are in the language, and that end
    base_answer_bits    how much more bits the base's own answers may need, if the base is a chat
                        model: one that ends at least half of its answers
    """

    bits_per_char: float = 0.05
    same_bits: float = 0.005
    answers: float = 0.9
    base_answer_bits: float = 0.25
    chat_model: float = 0.5

    def __str__(self) -> str:
        return (
            f"bits per character of a language that the base knew at most {self.bits_per_char:+.0%}"
            f"; at least {self.answers:.0%} of the sampled answers in the language, and ended; the "
            f"answers of a base that chats at most {self.base_answer_bits:+.0%} bits; nothing else "
            "worse than the base by more than chance (p < 0.01: one such measure in a hundred "
            "differs by chance)"
        )


LIMITS = Limits()


class Outcome(StrEnum):
    """What a measure says of the model."""

    GAINED = "gained"
    SAME = "same"
    COST = "cost"
    MISSED = "missed"


@dataclass(frozen=True)
class Finding:
    """A measure's outcome in one language, or kind of question; `figures` are base and model."""

    language: str
    measure: str
    outcome: Outcome
    figures: str

    def __str__(self) -> str:
        return f"{self.measure} {self.figures}"


@dataclass(frozen=True)
class Verdict:
    """The findings on the last stage; `languages` are those of the held-out texts."""

    languages: list[str]
    findings: list[Finding]

    def of(self, language: str, *outcomes: Outcome) -> list[Finding]:
        """Return the findings in a language that have one of these outcomes."""
        return [f for f in self.findings if f.language == language and f.outcome in outcomes]

    @property
    def kinds(self) -> list[str]:
        """The languages, then other kinds of questions."""
        return list(dict.fromkeys([*self.languages, *(f.language for f in self.findings)]))

    @property
    def missed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome is Outcome.MISSED]

    @property
    def headline(self) -> str:
        """Say whether the model is better in its new language, and whether it keeps the limits."""
        first = self.findings[0]  # bits per character of the new language
        better = "Better" if first.outcome is Outcome.GAINED else "No better"
        part = f"{len(self.missed)} of {len(self.findings)} measures outside their limits"
        if not self.missed:
            part = f"all {len(self.findings)} measures within their limits"
        return f"{better} in {name_language(first.language)}; {part}"

    @property
    def advice(self) -> str:
        """Say whether the measures speak against using the model."""
        if self.findings[0].outcome is not Outcome.GAINED:
            return "It has not learned its new language: do not ship it."
        if not self.missed:
            return "Nothing measured here speaks against shipping it."
        counts = Counter(name_language(finding.language) for finding in self.missed)
        where = ", ".join(f"{name} ({count})" for name, count in counts.items())
        return f"Ship it only to users who can live with what it misses: {where}."

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """Yield (language, outcome, findings) for a terminal; `same` only counts its measures."""
        for language in self.kinds:
            for outcome in Outcome:
                found = self.of(language, outcome)
                if not found:
                    continue
                said = ", ".join(map(str, found))
                if outcome is Outcome.SAME:
                    said = f"no measurable difference in {len(found)} measures"
                yield name_language(language), outcome, said


def name_language(language: str) -> str:
    """Return the English name of a language if it is known, or its code."""
    return LANGUAGE_NAMES.get(language, language)


def judge(results: Results) -> Verdict:
    """Judge the last stage of the results by the base and LIMITS."""
    base, last = results["stages"][0], results["stages"][-1]
    languages = list(base["languages"])
    findings = [
        *_judge_bits(base, last),
        *_judge_tokens(base, last),
        *_judge_answers(last),
        *_judge_items(base, last),
    ]
    order = [*languages, *(finding.language for finding in findings)]
    return Verdict(languages, sorted(findings, key=lambda finding: order.index(finding.language)))


def _judge_bits(base: Results, last: Results) -> Iterator[Finding]:
    for number, language in enumerate(base["languages"]):
        old, new = (stage["languages"][language]["bits_per_char"] for stage in (base, last))
        change = new / old - 1
        if number == 0:
            outcome = Outcome.GAINED if change < -LIMITS.same_bits else Outcome.MISSED
        elif abs(change) <= LIMITS.same_bits:
            outcome = Outcome.SAME
        elif change < 0:
            outcome = Outcome.GAINED
        else:
            outcome = Outcome.COST if change <= LIMITS.bits_per_char else Outcome.MISSED
        limit = ""
        if outcome is Outcome.MISSED:
            limit = f"; limit {LIMITS.bits_per_char:+.0%}" if number else "; limit: less"
        figures = f"{old:.3f} -> {new:.3f} ({change:+.1%}{limit})"
        yield Finding(language, "bits/char", outcome, figures)


def _judge_tokens(base: Results, last: Results) -> Iterator[Finding]:
    for language in base["languages"]:
        old, new = (stage["languages"][language]["tokens_per_char"] for stage in (base, last))
        if old != new:
            outcome = Outcome.GAINED if new < old else Outcome.COST
            yield Finding(language, "tokens/char", outcome, f"{old:.3f} -> {new:.3f}")


def _judge_answers(last: Results) -> Iterator[Finding]:
    for row in last["held_out"]:
        if row["way"] != "sampled":
            continue
        for key, measure in (
            ("in_language", "answers in the language"),
            ("ended", "answers that end"),
        ):
            if row[key] is not None:
                kept = row[key] >= LIMITS.answers
                figures = f"{row[key]:.0%}" + ("" if kept else f" (limit {LIMITS.answers:.0%})")
                outcome = Outcome.GAINED if kept else Outcome.MISSED
                yield Finding(row["kind"], measure, outcome, figures)


def _judge_items(base: Results, last: Results) -> Iterator[Finding]:
    """Judge what was measured on the same items as the base."""
    for row in last["probes"]:
        yield from _compare(row["language"], f"in-context {row['probe']}", row)
    for row in last["translations"]:
        measure = f"translation {row['direction']}, {row['shots']} examples"
        yield from _compare(row["language"], measure, row, show=show_number)
    for row in last["likeness"]:
        measure = "likeness to the expected answers"
        yield from _compare(row["kind"], measure, row, show=show_number)
    for language, rows in last["confusion"].items():
        for key, title in CONFUSION.items():
            yield from _compare(language, title, rows[key], less=key == "other_han")
    for language, rows in last["retention"].items():
        chats = base["retention"][language]["ended"]["mean"] >= LIMITS.chat_model
        row = rows["bits_per_char"]
        if chats and row["mean"] is not None and row["change"] is not None:
            old, new = row["mean"] - row["change"], row["mean"]
            missed = new > old * (1 + LIMITS.base_answer_bits)
            outcome = Outcome.MISSED if missed else Outcome.COST if new > old else Outcome.GAINED
            limit = f"; limit {LIMITS.base_answer_bits:+.0%}" if missed else ""
            figures = f"{old:.2f} -> {new:.2f} ({new / old - 1:+.0%}{limit})"
            yield Finding(language, "bits/char of the base's answers", outcome, figures)
    for language, rows in last["choices"].items():
        yield from _compare(language, "multiple choice", rows["compared"][CHOICE_METRIC])


def _compare(
    language: str,
    measure: str,
    row: Mapping[str, Any] | None,
    *,
    less: bool = False,
    show: Callable[[float], str] = lambda share: f"{round(share, 2) + 0.0:.0%}",  # no -0%
) -> Iterator[Finding]:
    """Yield the finding of a row of paired.Baseline.compare, if there are values to compare.

    `less` marks a measure of which less is better.
    """
    from chatglm_ja.evaluation.paired import is_measurable

    if not row or row["change"] is None:
        return
    outcome = Outcome.SAME
    if is_measurable(row):
        better = (row["change"] < 0) == less
        outcome = Outcome.GAINED if better else Outcome.MISSED
    old, new = row["mean"] - row["change"], row["mean"]
    yield Finding(language, measure, outcome, f"{show(old)} -> {show(new)}")
