"""A process pool that yields results in the order of the items.

Processes are spawned, not forked, so they hold none of the parent's memory. They end with the
parent, however it ends. With one process the work runs in the caller's own, where a debugger works.
If RAY_ADDRESS names a Ray cluster, its machines are the pool (cluster.py).
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from chatglm_ja.data import cluster
from chatglm_ja.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int, task_bytes: int = 0
) -> Iterator[Result]:
    """Yield `function(item)` for each item; the function, items and results are pickled.

    Items are drawn as needed, at most two per process. Raises DataError if a process is killed. On
    a cluster there is a process for each of its CPUs, or fewer, where `task_bytes` for each task
    would be more memory than a machine has.
    """
    if processes == 1:
        yield from map(function, items)
        return
    if cluster.is_named():
        yield from cluster.map_in_order(function, items, task_bytes)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        # Ctrl-C reaches every process of the terminal, and only the parent is to act on it: the
        # children inherit from their first moment that it is ignored. One empty task for each
        # process lets all of them start now.
        is_main = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        try:
            started = [pool.submit(os.getpid) for _ in range(processes)]
        finally:
            if is_main:
                signal.signal(signal.SIGINT, handler)
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


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
