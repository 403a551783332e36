"""The fault tests in two lengths: a short form in `make test`, and `make faults`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import fuzzing
from tests.faults.forks import Forks
from tests.faults.ledger import Ledger
from tests.pipeline import Runner


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="try every fault, and often")
    parser.addoption("--reliability", type=Path, help="the page whose tables are written anew")


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--thorough", default=False))


@pytest.fixture(scope="session", autouse=True)
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    found = Ledger()
    yield found
    found.tables["fuzz"] |= fuzzing.entries()
    path = request.config.getoption("--reliability", default=None)
    if path is not None:
        found.write(path)


@pytest.fixture(scope="session")
def forks(pipeline: Runner) -> Iterator[Forks]:
    """Steps that start at once, on the artifacts of the finished pipeline, each with one thread."""
    environment = pipeline.environment | {"OMP_NUM_THREADS": "1"}
    with Forks(environment, pipeline.root / "forked.log") as started:
        yield started
