"""The verdict: what counts as gained, as a cost, and as outside a limit."""

from typing import Any

import pytest

from chatglm_ja.reports import verdict
from chatglm_ja.reports.verdict import Outcome
from tests.reports.pages import compared


def outcomes(results: dict[str, Any]) -> dict[tuple[str, str], str]:
    found = verdict.judge(results).findings
    return {(finding.language, finding.measure): finding.outcome for finding in found}


def set_bits(results: dict[str, Any], language: str, base: float, last: float) -> None:
    for stage, bits in zip(results["stages"], (base, base, last), strict=True):
        score = dict(stage["languages"]["ja"], bits_per_char=bits)
        stage["languages"][language] = score


@pytest.mark.parametrize(
    ("language", "last", "outcome"),
    [
        ("ja", 3.0, "gained"),
        ("ja", 3.99, "missed"),  # a change that counts as none is no gain
        ("zh", 3.9, "gained"),
        ("zh", 4.01, "same"),
        ("zh", 4.19, "cost"),
        ("zh", 4.21, "missed"),
    ],
)
def test_bits_per_character(
    results: dict[str, Any], language: str, last: float, outcome: str
) -> None:
    set_bits(results, language, 4.0, last)
    assert outcomes(results)[language, "bits/char"] == outcome


def test_answers_have_a_limit(results: dict[str, Any]) -> None:
    row = {"way": "sampled", "in_language": 0.95, "ended": 0.85}
    results["stages"][-1]["held_out"] = [
        {"kind": "ja", **row},
        {"kind": "code", **row, "in_language": None, "ended": 0.9},
        {"kind": "ja", **row, "way": "greedy", "ended": 0.0},
    ]
    found = verdict.judge(results)
    assert outcomes(results) == {
        ("ja", "bits/char"): "gained",
        ("ja", "answers in the language"): "gained",
        ("ja", "answers that end"): "missed",
        ("code", "answers that end"): "gained",
    }
    assert found.kinds == ["ja", "code"]
    assert str(found.missed[0]) == "answers that end 85% (limit 90%)"
    assert found.headline == "Better in Japanese; 1 of 4 measures outside their limits"
    assert found.advice.endswith("what it misses: Japanese (1).")


def test_measures_on_items_must_not_be_worse_than_chance_explains(results: dict[str, Any]) -> None:
    base, _, last = results["stages"]
    better = compared(0.5, change=0.25, p=0.001)
    worse = compared(0.5, change=-0.25, p=0.001)
    unclear = compared(0.5, change=-0.25, p=0.2)
    last["probes"] = [
        {"language": "ja", "probe": "copy", **better},
        {"language": "zh", "probe": "copy", **worse},
        {"language": "zh", "probe": "reverse", **unclear},
        {"language": "zh", "probe": "labels", **compared(0.5)},  # the base has no value
    ]
    last["likeness"] = [{"kind": "code", **worse}]
    last["confusion"] = {
        "ja": {"lines": worse, "words": None, "other_han": worse},
    }
    chats, silent = ({"zh": {"ended": compared(share)}} for share in (0.9, 0.1))
    said = compared(3.0, change=1.0, p=0.0001)
    last["retention"] = {"zh": {"bits_per_char": said}}
    base["retention"] = chats
    found = outcomes(results)
    assert found.pop(("zh", "bits/char of the base's answers")) == "missed"
    assert found == {
        ("ja", "bits/char"): "gained",
        ("ja", "in-context copy"): "gained",
        ("ja", "all lines in the language"): "missed",
        ("ja", "Han outside JIS X 0208"): "gained",  # fewer are better
        ("zh", "in-context copy"): "missed",
        ("zh", "in-context reverse"): "same",
        ("code", "likeness to the expected answers"): "missed",
    }
    assert "in-context copy 75% -> 50%" in map(str, verdict.judge(results).of("zh", Outcome.MISSED))
    # A base that does not end its answers has no chat to lose.
    base["retention"] = silent
    assert ("zh", "bits/char of the base's answers") not in outcomes(results)


def test_a_share_of_nothing_has_no_sign(results: dict[str, Any]) -> None:
    row = {"language": "ja", "probe": "repeat", **compared(0.01, change=0.012, p=0.001)}
    results["stages"][-1]["probes"] = [row]
    assert "in-context repeat 0% -> 1%" in map(str, verdict.judge(results).findings)


def test_a_model_that_learned_nothing_is_not_to_be_shipped(results: dict[str, Any]) -> None:
    found = verdict.judge(results)
    assert found.headline == "Better in Japanese; all 1 measures within their limits"
    assert found.advice == "Nothing measured here speaks against shipping it."
    set_bits(results, "ja", 4.0, 4.5)
    found = verdict.judge(results)
    assert found.headline.startswith("No better in Japanese")
    assert "do not ship it" in found.advice
