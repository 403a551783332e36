"""Errors that a user can mend: one line each, saying what was found, what was expected, what to do.

`cli.run` prints them without a traceback. Everything else that escapes a step is a defect of this
project and keeps its traceback.
"""

import re

# Line breaks of all kinds, and what moves a terminal's cursor or changes its colours.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
MAX_CHARACTERS = 2000


class UserError(Exception):
    """Base of all errors that are shown as one line and end a step with exit status `status`."""

    status = 1

    def __str__(self) -> str:
        """One line, whatever a file says that is quoted in it; of a long one, both ends."""
        line = _CONTROLS.sub(" ", super().__str__())
        half = MAX_CHARACTERS // 2
        return line if len(line) <= MAX_CHARACTERS else f"{line[:half]} ... {line[-half:]}"


class ConfigError(UserError):
    """A setting that is out of range, or two settings that contradict each other."""


class ArtifactError(UserError):
    """An artifact folder that is missing, incomplete, damaged, or made from other inputs."""


class StoppedError(UserError):
    """A run that was asked to end by a signal and has saved what it had."""

    status = 128 + 15  # as of a process that SIGTERM ends


class DataError(UserError):
    """A corpus, tokenizer or checkpoint file that is not what its place requires."""
