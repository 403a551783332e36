"""Running a step as a program: logging, one-line errors, exit status.

Log lines and progress bars go to standard error. In a torchrun job only rank 0 prints them.
"""

import contextlib
import errno
import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from chatglm_ja import describe_missing, interrupts
from chatglm_ja.errors import StoppedError, UserError, first_line

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # few lines in a log file
# Messages that libraries print at import or on every start, and on which a user cannot act.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ.setdefault("DS_LOG_LEVEL", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
QUIET_LIBRARIES = ("accelerate", "deepspeed", "torch", "torch.utils._pytree", "torchao")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_main_process() -> bool:
    """Return whether this is rank 0, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def run(main: Callable[[], None]) -> None:
    """Run a step's `main`; print a UserError as one line and exit with its status."""
    try:
        _set_up()
        _report_errors(main)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Those that a second Ctrl-C kept from ending.
        for process in multiprocessing.active_children():
            process.kill()
        _exit("interrupted", interrupts.STATUS)
    finally:
        # Ctrl-C while the interpreter shuts down would print tracebacks.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _set_up() -> None:
    # A terminal or a file that is not in UTF-8 shows what it cannot write as an escape.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        errors = "replace" if stream is sys.stdin else "backslashreplace"
        # Standard input cannot be changed any more once it has been read from.
        with contextlib.suppress(io.UnsupportedOperation):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
    logging.basicConfig(
        level=logging.ERROR, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    # Libraries that have a level of their own, and the project's own modules and scripts.
    for library in QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    for own in ("chatglm_ja", "__main__"):
        logging.getLogger(own).setLevel(logging.INFO if is_main_process() else logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.unraisablehook = _interrupt_later


def _report_errors(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        rank = "" if is_main_process() else f"rank {os.environ['RANK']}: "
        kind = "stopped" if isinstance(error, StoppedError) else "error"
        _exit(f"{kind}: {rank}{error}", error.status)
    except ModuleNotFoundError as error:
        missing = describe_missing(error.name)
        if missing is None:
            raise
        _exit(missing)
    except OSError as error:
        # A full disk, a permission, a path: the system's message names the file.
        reason = first_line(error)
        if error.errno in DISK_FULL:
            reason += ": free some disk space, then re-run the command to resume"
        _exit(f"error: {reason}")


def _interrupt_later(unraisable: Any) -> None:
    """Raise a Ctrl-C again that arrived in a destructor, where Python drops it."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        main_thread = threading.main_thread().ident
        timer = threading.Timer(0.02, signal.pthread_kill, (main_thread, signal.SIGINT))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def print_last_line(message: str) -> None:
    """Print a program's last line below its progress bars, which are closed first."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
    start = "" if is_main_process() else "\n"  # the bar of rank 0 is still open
    print(start + message, file=sys.stderr, flush=True)


def _exit(message: str, status: int = 1) -> NoReturn:
    print_last_line(message)
    sys.exit(status)
