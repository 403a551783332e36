"""Strategies that generate files at random, and the errors with which reading them may end.

Each test of test_fuzz_*.py tries FUZZ_EXAMPLES files. Up to 50, they are the same on every run;
above 50, they differ:

    FUZZ_EXAMPLES=2000 python -m pytest tests/faults -k fuzz
"""

import contextlib
import functools
import json
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.errors import UserError
from tests.conftest import FIXTURES
from tests.faults.ledger import Row

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
SECONDS = 20  # longer counts as a hang
LONGEST_MESSAGE = 4000
BASE = FIXTURES / "tiny_chatglm3"
SHARD = "model-00002-of-00003.safetensors"

SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

TRIED: Counter[str] = Counter()
HANDLED: Counter[str] = Counter()


def fuzz(title: str, *strategies: Any, **named: Any) -> Callable[[Any], Any]:
    """Return a decorator that calls a test with many generated inputs and counts them."""

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def counted(*given: Any, **fixtures: Any) -> None:
            try:
                test(*given, **fixtures)
            except Exception:  # inputs that hypothesis discards do not count
                TRIED[title] += 1
                raise
            TRIED[title] += 1
            HANDLED[title] += 1

        return SETTINGS(given(*strategies, **named)(counted))

    return decorate


def count_trials() -> dict[str, Row]:
    """Return the number of trials by title, for docs/reliability.md."""
    return {title: Row(tried, HANDLED[title]) for title, tried in TRIED.items()}


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        yield Path(name)


@contextlib.contextmanager
def refusals() -> Iterator[list[str]]:
    """Allow a one-line UserError or the system's own OSError; yield a list of the messages."""

    def too_slow(*_: Any) -> None:
        pytest.fail(f"still busy after {SECONDS} seconds")

    said: list[str] = []
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        yield said
    except UserError as error:
        said.append(str(error))
        assert said[0].isascii() or said[0].encode("utf-8", "surrogatepass")
        assert said[0].splitlines() == [said[0]], f"not one line: {said[0]!r}"
        assert len(said[0]) <= LONGEST_MESSAGE, said[0]
    except OSError as error:
        assert error.errno, repr(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- Building blocks of files --------------------------------------------------------------------

SPELLINGS = (*tokenizer.SPECIAL_TOKENS, "<s>", "</s>", "<unk>", "<0x0A>", tokenizer.SPACE)
any_text = st.text(st.characters(), max_size=20) | st.sampled_from(
    [*SPELLINGS, "../x", "/etc/passwd", "..", ".", "", "a\nb", "\0", "\ud800", "x" * 5000]
)
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, True, 0.5, 2**31, 2**63, 2**64, 10**9, 10**400, -(10**18)])
)
scalars = st.none() | st.booleans() | numbers | any_text


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def values(leaves: st.SearchStrategy[Any] = scalars, keys: Any = any_text) -> Any:
    """Return a strategy for any JSON value."""
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )


any_value = values()
# The JSON parser accepts some depths that are too deep for everything else.
deep = st.sampled_from([90, 300, 700, 900, 950, 970, 980, 990, 1500, 5000]).flatmap(
    lambda depth: st.sampled_from(
        [nested(depth), nested(depth, '{"a":', "1" + "}")[: depth * 5] + "1" + "}" * depth]
    )
)


def json_texts(of: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    """Return a strategy for JSON text, some of it extremely deep."""
    return of.map(json.dumps) | deep | deep.map(lambda text: f'{{"text": {text}}}')


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Corrupt bytes: remove, replace, insert or repeat some, or truncate."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        size = draw(st.sampled_from([0, 1, 2, 8, 100, len(content)]))
        part = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"\0" * 8, b"\xff" * 8, content[start : start + size]])
        )
        content = content[:start] + part + content[start + size :]
    return content


def changed(valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for copies of a dictionary with entries replaced, removed or renamed."""

    @st.composite
    def change(draw: st.DrawFn) -> dict[str, Any]:
        whole = json.loads(json.dumps(valid))
        for _ in range(draw(st.integers(1, 3))):
            place = whole
            while place:
                key = draw(st.sampled_from(sorted(place)))
                if not isinstance(place[key], dict) or draw(st.booleans()):
                    break
                place = place[key]
            if not place:
                continue
            kind = draw(st.sampled_from(["replace", "remove", "rename"]))
            value = place.pop(key)
            if kind == "replace":
                place[key] = draw(any_value)
            elif kind == "rename":
                place[draw(any_text)] = value
        return whole

    return change()
