"""The library behind the numbered steps; each subpackage's docstring says what it is for.

The steps import this package. It imports neither a step nor constants.py: every path and setting is
passed in, so each module can be used and tested on its own, in any folder.
"""

from chatglm_ja import interrupts  # first: it handles Ctrl-C from here on

# isort: split
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)


def use_the_environment() -> str:
    """Return what to do in a shell whose Python is not that of the project's environment."""
    project = Path(__file__).resolve().parents[1]
    activate = f"`source {project}/.venv/bin/activate`"
    if (project / ".venv").exists():
        return "run " + activate
    return f"run `make -C {project} .venv/ready`, then {activate}"


# All of this file but what follows also runs on older Pythons, to say that they are too old.
if sys.version_info < OLDEST_PYTHON:
    sys.exit(
        "error: {} is Python {}.{}, expected 3.11 to 3.14: {}".format(
            sys.executable, *sys.version_info[:2], use_the_environment()
        )
    )


def describe_missing(name: str | None) -> str | None:
    """Return the error for a module that was not found; None if it is one of the project's own."""
    package = (name or "").partition(".")[0]
    if package in ("", "chatglm_ja", "constants"):
        return None
    return (
        f"error: the package {package} is not installed for {sys.executable}: "
        f"{use_the_environment()}, or `pip install -r requirements.txt`"
    )


def _exit_in_one_line(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Replace the traceback of a missing package, or of Ctrl-C, while a step is imported."""
    # At the prompt of an interactive session Ctrl-C ends nothing.
    if isinstance(error, KeyboardInterrupt) and not hasattr(sys, "ps1"):
        interrupts.report()
        sys.exit(interrupts.STATUS)
    missing = describe_missing(error.name) if isinstance(error, ModuleNotFoundError) else None
    if missing:
        print(missing, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


sys.excepthook = _exit_in_one_line
