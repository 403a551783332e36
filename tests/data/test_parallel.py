"""The process pool: results in order, errors passed on, no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatglm_ja.data import parallel
from chatglm_ja.errors import DataError
from tests.conftest import PROJECT


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return number * number


def fail(number: int) -> int:
    if number == 3:
        raise DataError("bad item 3")
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order(processes: int) -> None:
    drawn: list[int] = []

    def items() -> object:
        for number in range(20):
            drawn.append(number)
            yield number

    results = parallel.map_in_order(slow_square, items(), processes)  # type: ignore[arg-type]
    assert next(results) == 0
    assert len(drawn) <= 2 * processes
    assert list(results) == [number**2 for number in range(1, 20)]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_reaches_the_caller(processes: int) -> None:
    with pytest.raises(DataError, match="bad item 3"):
        list(parallel.map_in_order(fail, range(9), processes))


def test_a_killed_process_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"one of 2 processes was killed.*lower --num-processes"):
        list(parallel.map_in_order(die, range(9), 2))


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time, os\n"
        "from chatglm_ja.data import parallel\n"
        "def work(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        f"    list(parallel.map_in_order(work, [{str(tmp_path / 'pid')!r}], 2))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": str(PROJECT)}
    )
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    child = Path("/proc") / pid.read_text() / "stat"
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child outlived its parent")
