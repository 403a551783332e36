"""Repetition: units of any script, and the two measures against what they are defined as."""

import random

import pytest

from chatglm_ja.evaluation import repetition


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("the cat, the cat", ["the", "cat", ",", "the", "cat"]),
        ("猫が好き。", ["猫", "が", "好", "き", "。"]),
        ("Basicの例 12.5%", ["Basic", "の", "例", "12", ".", "5", "%"]),
        ("スーパー𠮷野家", [*"スーパー𠮷野家"]),
        (" \n", []),
        ("été_1", ["été_1"]),
    ],
)
def test_units(text: str, units: list[str]) -> None:
    assert repetition.split_units(text) == units


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c", 0.0),
        ("a b c d", 0.0),
        ("a b c d a b c d", 0.2),  # 5 four-grams, abcd twice
        ("a a a a a a", 2 / 3),
        ("", 0.0),
    ],
)
def test_repeated_share(text: str, share: float) -> None:
    assert repetition.repeated_share(repetition.split_units(text)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("a", 0),
        ("a a", 0),  # twice is no loop
        ("a a a", 3),
        ("x a b a b a b c", 6),
        ("a b a b a b a", 7),
        ("a b c a b c", 0),
        ("p q q q r a b c a b c a b c s", 9),
        ("はい。はい。はい。", 9),
    ],
)
def test_longest_loop(text: str, length: int) -> None:
    assert repetition.longest_loop(repetition.split_units(text)) == length


def test_longest_loop_is_that_of_the_definition() -> None:
    def by_definition(parts: list[str]) -> int:
        """The longest stretch with a period that it holds at least three times."""
        best = 0
        for start in range(len(parts)):
            for end in range(start + 3, len(parts) + 1):
                stretch = parts[start:end]
                for period in range(1, len(stretch) // 3 + 1):
                    if all(a == b for a, b in zip(stretch, stretch[period:], strict=False)):
                        best = max(best, len(stretch))
        return best

    draw = random.Random(0)
    for _ in range(200):
        parts = [draw.choice("ab") for _ in range(draw.randrange(16))]
        assert repetition.longest_loop(parts) == by_definition(parts), parts
