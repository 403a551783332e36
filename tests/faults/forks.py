"""Run steps in processes forked from a server that has already imported the heavy libraries.

A kill at a random moment then hits the step's work instead of its imports, and hundreds of runs
take minutes. Everything else behaves as if the script were started by hand.
"""

import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.pipeline import PROJECT, SMALL, only_error

SERVER = "import tests.faults.forks as forks; forks.serve()"


@dataclass(frozen=True)
class Ended:
    """A step that has ended."""

    status: int  # as in subprocess: negative for the signal that ended it
    seconds: float
    said: str  # standard error

    @property
    def error(self) -> str:
        """The one-line error that the user sees."""
        return only_error(self.status, self.said)


class Forks:
    """Start steps: `with Forks(environment, log) as forks: forks.small("step1_....py", ...)`."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**environment, "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()

    def small(
        self,
        script: str,
        *flags: str,
        kill_after: float | None = None,
        largest_file: int | None = None,
    ) -> Ended:
        """Run a step of the small pipeline to its end, or SIGKILL it after `kill_after` seconds.

        Writes that make a file larger than `largest_file` bytes fail.
        """
        assert self.server.stdin is not None and self.server.stdout is not None
        command = [str(PROJECT / script), *SMALL[script].split(), *flags]
        order = {"command": command, "log": str(self.log), "largest_file": largest_file}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        started = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            # It cannot have been reaped yet: the server waits for it only when told to.
            os.kill(pid, signal.SIGKILL)
        self.server.stdin.write("wait\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        seconds = time.monotonic() - started
        return Ended(status, seconds, self.log.read_text(encoding="utf-8", errors="replace"))


def serve() -> None:
    """Fork a process for every line of standard input; print its pid, then its exit status."""
    # The modules that the steps import when they begin their work; they are not used here.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import GlmForCausalLM  # noqa: F401

    import chatglm_ja.chatglm3.tokenizer_files
    import chatglm_ja.data.prepare_texts
    import chatglm_ja.evaluation.answers
    import chatglm_ja.reports.data_report
    import chatglm_ja.reports.merge_report
    import chatglm_ja.training.train  # noqa: F401

    gc.freeze()  # otherwise every fork's collector would touch, and so copy, all of this
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with open(order["log"], "wb") as log, open(os.devnull, "rb") as nothing:
                os.dup2(nothing.fileno(), 0)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if order["largest_file"]:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                limits = (order["largest_file"], resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            os._exit(_run(order["command"]))
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(command: Sequence[str]) -> int:
    """Run a script as Python would, but without the interpreter's memory-copying shutdown."""
    sys.argv = [*command]
    status: object = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    return status if isinstance(status, int) else int(status is not None)
