"""How a step ends as a program."""

import signal
import subprocess
import sys

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


@pytest.mark.parametrize("script", STEPS)
def test_a_python_without_the_packages_is_one_line(script: str) -> None:
    result = subprocess.run(
        [sys.executable, "-S", str(PROJECT / script)], capture_output=True, text=True, check=False
    )
    assert only_error(result.returncode, result.stderr).endswith("pip install -r requirements.txt`")
    assert len(result.stderr.splitlines()) == 1
