"""Watchdog: no process of a distributed run waits forever for one that ended or hangs.

When a process ends, its connections close, and the others' next collective operation fails. One
that hangs (stopped, a stuck GPU, a network that is down) leaves the others waiting in a library,
where no exception reaches them. So a thread of each process looks for progress, and ends the
process if there is none.
"""

import os
import re
import threading
import time
from collections.abc import Callable

import torch

from chatglm_ja.cli import print_last_line
from chatglm_ja.errors import UserError

MAX_REASON_LENGTH = 160
OWN_PAUSE_SECONDS = 2.0


class LostError(UserError):
    """Another process of the run has ended or does not answer."""


class Watchdog:
    """Ends this process when others are lost: `with Watchdog(600, advice) as w: ... w.progress()`

    seconds     without progress after which the process ends
    advice      returns what to tell the user; called when that happens
    """

    def __init__(self, seconds: float, advice: Callable[[], str]) -> None:
        self.seconds = seconds
        self.advice = advice
        self._last = time.monotonic()
        self._stopped = threading.Event()

    def progress(self) -> None:
        """Report that this process has made progress."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.progress()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._stopped.set()
        # gloo has no exception of its own, but names its source files in the message.
        if isinstance(error, torch.distributed.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error)
        ):
            raise LostError(
                f"another process of the run has ended ({first_sentence(error)}): {self.advice()}"
            ) from None

    def _watch(self) -> None:
        interval = min(1.0, self.seconds / 10)
        woken = time.monotonic()
        while not self._stopped.wait(interval):
            before, woken = woken, time.monotonic()
            if woken - before > 2 * interval + OWN_PAUSE_SECONDS:
                self.progress()  # this process itself was stopped, by Ctrl-Z or a scheduler
            waited = woken - self._last
            if waited > self.seconds:
                print_last_line(
                    f"error: rank {os.environ['RANK']}: no progress for {waited:.0f} s, another "
                    f"process of the run stands still: {self.advice()}"
                )
                # The main thread waits inside a library: an exception would not reach it.
                os._exit(1)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a library's message, without its source location."""
    text = re.sub(r"^\[[^]]*:\d+\] ", "", str(error).partition("\n")[0])
    return text.partition(". ")[0][:MAX_REASON_LENGTH]
