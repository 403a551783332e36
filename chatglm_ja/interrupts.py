"""Ctrl-C from a program's first import on: no traceback, exit status 130.

A step imports for seconds before there is anything to interrupt. An exception that passes through
an import of a library is printed, replaced or lost there, so Ctrl-C then ends the process itself.
Elsewhere it raises KeyboardInterrupt as usual, which `cli.run` reports, or the package's hook for
uncaught exceptions between two imports of a script.
"""

import _signal as signal  # which loads at once; the enums of signal take 10 ms
import os
from types import FrameType

STATUS = 128 + signal.SIGINT


def handle_ctrl_c(_: int, frame: "FrameType | None") -> None:  # quoted for old Pythons
    """Raise KeyboardInterrupt; end the process if the main thread is importing a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            report()
            os._exit(STATUS)
        frame = frame.f_back
    raise KeyboardInterrupt


def report() -> None:
    """Print the last line of an interrupted program; of several processes only rank 0 does."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted\n")


try:
    # Another program than a step may have a handler of its own; under nohup Ctrl-C is ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle_ctrl_c)
except ValueError:
    pass  # imported in a thread, where handlers cannot be set
