"""How a step ends as a program."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.pipeline import PROJECT, STEPS, only_error

IN_A_DESTRUCTOR = """
import os, signal, time
from chatglm_ja.cli import run

class Resource:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def main():
    Resource()
    print("it goes on")
    time.sleep(30)

run(main)
"""
AFTER_THE_END = """
import atexit, os, signal, time
from chatglm_ja.cli import run

atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(0.1))
run(lambda: print("it goes on"))
"""


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [(IN_A_DESTRUCTOR, 130, "interrupted\n"), (AFTER_THE_END, 0, "")],
)
def test_ctrl_c_is_neither_lost_nor_a_traceback(program: str, status: int, said: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False,
        timeout=20,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (status, "it goes on\n", said)
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN


SWALLOWING = """
import time
try:
    print("importing", flush=True)
    time.sleep(30)
except BaseException:
    raise ImportError("no such thing") from None
"""
STEP = """
import runpy, sys
import chatglm_ja
print("ready", flush=True)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
POOL = """
import time
from chatglm_ja.cli import run
from chatglm_ja.data.parallel import map_in_order

def work(number):
    print("at work", flush=True)
    time.sleep(30)

if __name__ == "__main__":
    run(lambda: list(map_in_order(work, range(9), 2)))
"""


def interrupt(command: list[str], *delays: float) -> tuple[int, str]:
    """Start a program; after its first line and each delay press Ctrl-C for all its processes."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    for delay in delays:
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGINT)
    try:
        said = process.communicate(timeout=20)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_in_an_import_ends_the_process_at_once(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may turn what passes through its imports into another error."""
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "library.py").write_text(SWALLOWING)
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import chatglm_ja, library"
    said = "interrupted\n" if rank == "0" else ""
    assert interrupt(["-c", program], 0.0) == (130, said)


@pytest.mark.parametrize("script", STEPS)
def test_ctrl_c_while_a_step_starts_is_no_traceback(script: str, tmp_path: Path) -> None:
    command = ["-c", STEP, script, "--check", "--output-dir", str(tmp_path / "out")]
    for delay in (0.0, 0.05, 0.15):
        status, said = interrupt(command, delay)
        assert "Traceback" not in said
        # The artifacts need not be there.
        assert (status, said) == (130, "interrupted\n") or status in (0, 1)


@pytest.mark.parametrize("delays", [(0.0, 0.0), (0.0, 0.3), (0.0, 0.0, 0.1, 0.1)])
def test_ctrl_c_again_and_again_is_no_traceback(delays: tuple[float, ...], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(POOL)
    status, said = interrupt([str(tmp_path / "program.py")], *delays)
    assert status == 130
    assert said.replace("at work\n", "") == "interrupted\n"


@pytest.mark.parametrize("script", STEPS)
def test_a_python_without_the_packages_is_one_line(script: str) -> None:
    result = subprocess.run(
        [sys.executable, "-S", str(PROJECT / script)], capture_output=True, text=True, check=False
    )
    assert only_error(result.returncode, result.stderr).endswith("pip install -r requirements.txt`")
    assert len(result.stderr.splitlines()) == 1
