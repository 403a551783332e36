"""A process pool that yields results in the order of the items.

Processes are spawned, not forked, so they hold none of the parent's memory. They end with the
parent, however it ends. With one process the work runs in the caller's own, where a debugger works.
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
    """Yield `function(item)` for each item; the function, items and results are pickled.

    Items are drawn as needed, at most two per process. Raises DataError if a process is killed.
    """
    if processes == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        with _ignore_interrupts():  # the children inherit it from their first moment
            # One empty task for each process, so that all of them start now.
            started = [pool.submit(os.getpid) for _ in range(processes)]
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
            f"one of {processes} processes was killed, probably for lack of memory: lower "
            "--num-processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ignore_interrupts() -> Iterator[None]:
    """Ignore SIGINT in processes that are started meanwhile.

    Ctrl-C reaches every process of the terminal; only the parent is to act on it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
