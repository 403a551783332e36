"""Work in several processes whose results come in the order of the items.

The processes start afresh (spawn), so that they hold nothing of the parent's memory, and end with
it, however it ends. With one process the work is done in the caller's own: a debugger stops there.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from chatglm_ja.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int
) -> Iterator[Result]:
    """`function` of each item; it, the items and the results are pickled.

    Items are drawn as they are needed: at most two per process are held.
    """
    if processes == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        with _interrupts_ignored():  # as the children will, from their first moment
            started = [pool.submit(_begin) for _ in range(processes)]
        for future in started:
            future.result()
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {processes} processes was killed, as when memory runs out: lower "
            "--num-processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal: the parent decides what it means.

    Processes inherit what is ignored when they are started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _begin() -> None:
    """The first work of a process: there is one for each, so that all are started at once."""


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
