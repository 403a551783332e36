"""The processes of one run: none waits for ever for another that has ended or stands still.

A process that ends takes its connections with it, and the others' next exchange fails. One that
stands still (stopped, a hung GPU, a network that is down) leaves them waiting in theirs, where no
exception reaches them: a thread of each process watches for signs of progress and ends it.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch

from chatglm_ja.cli import print_last_line
from chatglm_ja.errors import UserError

LONGEST_REASON = 160
OWN_PAUSE_SECONDS = 2.0


class LostError(UserError):
    """Another process of the run has ended, or does not answer."""


class Watchdog:
    """Ends this process when others are lost: `with Watch(...) as watch: ... watch.progress() ...`

    seconds     without progress after which the process ends
    advice      what a user is told to do, asked for at that time
    """

    def __init__(self, seconds: float, advice: Callable[[], str]) -> None:
        self.seconds = seconds
        self.advice = advice
        self._last = time.monotonic()
        self._over = threading.Event()

    def progress(self) -> None:
        """Say that this process has done something since the last time."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.progress()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        _: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if error is not None and _is_of_a_lost_process(error):
            raise LostError(
                f"another process of the run has ended ({first_sentence(error)}): {self.advice()}"
            ) from None

    def _watch(self) -> None:
        interval = min(1.0, self.seconds / 10)
        woken = time.monotonic()
        while not self._over.wait(interval):
            before, woken = woken, time.monotonic()
            if woken - before > 2 * interval + OWN_PAUSE_SECONDS:
                self.progress()  # this process was stopped itself, by Ctrl-Z or a scheduler
            waited = woken - self._last
            if waited > self.seconds:
                print_last_line(
                    f"error: rank {os.environ['RANK']}: no progress for {waited:.0f} s, another "
                    f"process of the run stands still: {self.advice()}"
                )
                # The main thread waits in a library: an exception would not reach it.
                os._exit(1)


def _is_of_a_lost_process(error: BaseException) -> bool:
    """gloo has no exception of its own, but names its files in what it says."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def first_sentence(error: BaseException) -> str:
    """The first sentence of what a library says, without the place in its sources."""
    text = re.sub(r"^\[[^]]*:\d+\] ", "", str(error).partition("\n")[0])
    return text.partition(". ")[0][:LONGEST_REASON]
