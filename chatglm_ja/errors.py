"""Errors that users can fix. Each is one line: what was found, what was expected, what to do.

`cli.run` prints them without a traceback. Any other exception that escapes a step is a bug and
keeps its traceback.
"""

import difflib
import re
from collections.abc import Iterable

# All kinds of line breaks, and the characters that move a terminal's cursor or change its colors.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
MAX_CHARACTERS = 2000
DASHES = "-\u2010-\u2015\u2212"  # as typed, and as copied from a formatted page


class UserError(Exception):
    """Base class of errors that end a step with one line and the exit status `status`."""

    status = 1

    def __str__(self) -> str:
        """Return the message as one line, whatever it quotes; of a long one, both ends."""
        line = _CONTROLS.sub(" ", super().__str__())
        half = MAX_CHARACTERS // 2
        return line if len(line) <= MAX_CHARACTERS else f"{line[:half]} ... {line[-half:]}"


class ConfigError(UserError):
    """A setting is out of range, or two settings contradict each other."""


class ArtifactError(UserError):
    """An artifact folder is missing, incomplete, damaged, or was made from other inputs."""


class StoppedError(UserError):
    """A signal ended the run after it saved a checkpoint."""

    status = 128 + 15  # that of a process ended by SIGTERM


class DataError(UserError):
    """A corpus, tokenizer or checkpoint file is not what it should be."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, to be quoted; if it is empty, the type."""
    return str(error).partition("\n")[0] or type(error).__name__


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" for a mistyped name, or "" if none of the names is like it.

    Case, dashes and underscores do not count. A name is recognized by its start, by the initials of
    its words (lr for learning-rate), or by most of its letters.
    """
    plain = {_plain(name): name for name in names}
    word = _plain(word)
    if not word:
        return ""
    found = (
        [name for name in plain if name == word]
        or [name for name in plain if name.startswith(word)]
        or [name for name in plain if word == "".join(part[:1] for part in name.split("-"))]
        or difflib.get_close_matches(word, plain, n=1)
    )
    return f" (did you mean {' or '.join(plain[name] for name in found[:3])}?)" if found else ""


def _plain(name: str) -> str:
    return re.sub(f"[{DASHES}_]", "-", name.lower()).strip("-")
