"""SIGTERM and Ctrl-C stop a run after its current step; a second signal ends it at once."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

# Schedulers signal the launcher and the processes it forwards signals to: repeats within this time
# are one signal.
SAME_SIGNAL_SECONDS = 3.0


@contextmanager
def stopping_on_signals(trainer: Any) -> Iterator[None]:
    """Set the trainer's `signal_seen` on SIGTERM or SIGINT; end at once on a second signal."""
    seen_at = math.inf

    def handle(number: int, _: Any) -> None:
        nonlocal seen_at
        if time.monotonic() > seen_at + SAME_SIGNAL_SECONDS:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        if not trainer.signal_seen:
            seen_at = time.monotonic()
            trainer.signal_seen = True
            log.info("%s: stopping after this step", signal.Signals(number).name)

    previous: dict[int, Any] = {
        number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
