"""Errors that a user can mend: one line each, saying what was found, what was expected, what to do.

`cli.run` prints them without a traceback. Everything else that escapes a step is a defect of this
project and keeps its traceback.
"""


class UserError(Exception):
    """Base of all errors that are shown as one line and end a step with exit status `status`."""

    status = 1


class ConfigError(UserError):
    """A setting that is out of range, or two settings that contradict each other."""


class ArtifactError(UserError):
    """An artifact folder that is missing, incomplete, damaged, or made from other inputs."""


class StoppedError(UserError):
    """A run that was asked to end by a signal and has saved what it had."""

    status = 128 + 15  # as of a process that SIGTERM ends


class DataError(UserError):
    """A corpus, tokenizer or checkpoint file that is not what its place requires."""
