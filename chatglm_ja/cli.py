"""How a step runs as a program: log lines, one-line errors, exit status.

Log lines and progress bars go to standard error, and only rank 0 of a torchrun job prints them.
"""

import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from chatglm_ja.errors import StoppedError, UserError

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # a log file wants few lines
# Said by libraries at import or on every start, and about nothing that a user can act on.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DS_LOG_LEVEL", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_main_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def run(main: Callable[[], None]) -> None:
    """Run a step's `main`; a UserError becomes one line on standard error and exit status 1."""
    logging.basicConfig(
        level=logging.INFO if is_main_process() else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for library in ("accelerate", "datasets", "deepspeed", "httpx", "huggingface_hub", "matplotlib",
                    "torch"):  # fmt: skip
        logging.getLogger(library).setLevel(logging.ERROR)
    # Libraries warning each other of changes to come.
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.unraisablehook = _interrupt_later
    try:
        main()
    except UserError as error:
        where = "" if is_main_process() else f"rank {os.environ['RANK']}: "
        kind = "stopped" if isinstance(error, StoppedError) else "error"
        _end(f"{kind}: {where}{error}", error.status)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "chatglm_ja":
            raise
        _end(
            f"error: the package {error.name} is not installed for {sys.executable}: run "
            "`source .venv/bin/activate` first, or `pip install -r requirements.txt`"
        )
    except OSError as error:
        # The disk, a permission, a path: the system's own words name the file.
        reason = str(error).partition("\n")[0] or type(error).__name__
        if error.errno in NO_ROOM:
            reason += ": free some of the disk; the same command goes on from what is finished"
        _end(f"error: {reason}")
    except KeyboardInterrupt:
        _end("interrupted", status=130)
    finally:
        # What is left is the interpreter's own end, which Ctrl-C would fill with tracebacks.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt_later(lost: Any) -> None:
    """Ctrl-C that meets a destructor is dropped by Python: say it again when that is over."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        main_thread = threading.main_thread().ident
        again = threading.Timer(0.02, signal.pthread_kill, (main_thread, signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


def print_last_line(message: str) -> None:
    """Say the last line of a program; progress bars still open end above it."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
    start = "" if is_main_process() else "\n"  # the bar of rank 0 is open
    print(start + message, file=sys.stderr, flush=True)


def _end(message: str, status: int = 1) -> NoReturn:
    print_last_line(message)
    sys.exit(status)
