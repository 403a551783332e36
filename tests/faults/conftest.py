"""Fixtures of the fault tests: a short form runs in `make test`, all faults in `make faults`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import fuzzing
from tests.faults.forks import Forks
from tests.faults.ledger import Ledger
from tests.pipeline import Runner


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="try every fault, many times")
    parser.addoption("--reliability", type=Path, help="the page whose tables to rewrite")


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--thorough", default=False))


@pytest.fixture(scope="session", autouse=True)
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    counts = Ledger()
    yield counts
    counts.tables["fuzz"] |= fuzzing.count_trials()
    path = request.config.getoption("--reliability", default=None)
    if path is not None:
        counts.write(path)


@pytest.fixture(scope="session")
def forks(pipeline: Runner) -> Iterator[Forks]:
    """Yield a server that starts steps without import time, one thread each, on the pipeline's
    artifacts."""
    environment = pipeline.environment | {"OMP_NUM_THREADS": "1"}
    with Forks(environment, pipeline.root / "forked.log") as started:
        yield started
