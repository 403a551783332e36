"""Settings as frozen dataclasses whose fields become the flags of a command line.

A field carries its help text and its limits. `parse` turns the class into an argument parser, takes
defaults from the profile in constants.py, and reports every value out of range and every
contradiction at once, before anything is loaded. No large library is imported here, so `--help`
answers at once. Each room's settings.py holds the classes of its steps.
"""

import argparse
import dataclasses
import enum
import itertools
import logging
import math
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from chatglm_ja import settings_file
from chatglm_ja.errors import DASHES, ConfigError, did_you_mean
from chatglm_ja.settings_file import flag
from chatglm_ja.sources import Source, read_argument

log = logging.getLogger(__name__)

VERIFIED_BYTES = 10**9  # models up to this size are loaded for verification by default
REPORTS_BYTES = 20 * 10**6  # a generous allowance for reports, curves and tables
CORES = len(os.sched_getaffinity(0))


def setting(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    affects_result: bool = True,
    unset: str = "",
) -> Any:
    """Declare a dataclass field with its help text and its inclusive limits.

    `affects_result=False` marks settings that do not change the result, such as the number of
    threads. They are not compared when a finished step is run again. `unset` is the error if
    neither the profile nor the command line sets a field without a default.
    """
    metadata = {
        "help": help, "low": low, "high": high, "affects_result": affects_result, "unset": unset
    }  # fmt: skip
    return field(default=default, metadata=metadata)


class Choice(enum.StrEnum):
    """Names with explanations, such as the values of a flag, whose phrases are for --help.

        class Layout(Choice):
            GLM = "glm", "transformers' own class"

    A subclass whose members carry more than that takes the rest in its `__init__`.
    """

    phrase: str

    def __new__(cls, name: str, phrase: str, *_: Any) -> "Choice":
        member = str.__new__(cls, name)
        member._value_ = name
        member.phrase = phrase
        return member

    @classmethod
    def explain(cls) -> str:
        """Return the names and phrases of all members, for a help text."""
        return "; ".join(f"{member}: {member.phrase}" for member in cls)


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings that all steps have."""

    output_dir: Path = setting("folder to publish the result as")
    overwrite: bool = setting("replace an existing result", False, affects_result=False)
    check: bool = setting("check settings and inputs, then exit", False, affects_result=False)
    verify: bool | None = setting(
        "hash every input file and compare the output model's logits with the expected ones; the "
        "default skips files over 1 GiB and models over 1 GB",
        None,
        affects_result=False,
    )

    def __post_init__(self) -> None:
        problems = [*self._limits(), *self.contradictions()]
        if problems:
            raise ConfigError("; ".join(problems))

    def contradictions(self) -> list[str]:
        """Return what is wrong with the settings together, one sentence each."""
        return []

    def disk_bytes(self) -> int:
        """Estimate the disk space that the step takes."""
        return REPORTS_BYTES

    def should_compare_logits(self, size: int) -> bool:
        """Return whether a model of `size` bytes is to be loaded and verified."""
        return size <= VERIFIED_BYTES if self.verify is None else self.verify

    def arguments(self) -> dict[str, Any]:
        """Return the settings that shape the result, without paths: inputs count by content."""
        arguments = {}
        for entry in dataclasses.fields(self):
            if not entry.metadata["affects_result"] or "Path" in str(entry.type):
                continue
            value = getattr(self, entry.name)
            if "Source" in str(entry.type):
                value = [source.settings() for source in value]
            arguments[entry.name] = value
        return arguments

    def _limits(self) -> list[str]:
        problems = []
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            low, high = entry.metadata["low"], entry.metadata["high"]
            if isinstance(value, int | float) and not low <= value <= high:
                problems.append(f"{flag(entry.name)} is {value}, expected {low:g} to {high:g}")
        return problems


Config = TypeVar("Config", bound=StepConfig)


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        _, is_unknown, words = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in words.split() if re.match(f"[{DASHES}]", word)]
        hints = (did_you_mean(name, self._option_string_actions) for name in flags if is_unknown)
        raise ConfigError(message + next(filter(None, hints), " (--help lists the flags)"))


def parse(
    config: type[Config],
    description: str,
    defaults: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    *,
    profile: str = "",
) -> Config:
    """Parse the command line of a step; `defaults`, the profile's, override those of the class.

    A step whose settings are good begins its log with the line `profile`.
    """
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config)
    for entry in dataclasses.fields(config):
        default = defaults.get(entry.name, entry.default)
        if default is dataclasses.MISSING:
            default = None
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        suffix = "" if default is None or default == () else f" (default: {shown})"
        parser.add_argument(
            flag(entry.name),
            default=default,
            help=(entry.metadata["help"] + suffix).replace("%", "%%"),
            **_argument_type(hints[entry.name]),
        )
    unknown = sorted(defaults.keys() - hints.keys())
    if unknown:
        raise ConfigError(
            f"constants.py sets {', '.join(unknown)}, which is not a setting of this step"
        )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of settings, such as the settings.yaml beside a result; flags win over it",
    )
    argv = sys.argv[1:] if argv is None else argv
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    if (file := finder.parse_known_args(argv)[0].config) is not None:
        arguments, others = settings_file.read(file, hints)
        parser.set_defaults(**others)
        argv = [*arguments, *argv]
    values = vars(parser.parse_args(argv))
    del values["config"]
    for entry in dataclasses.fields(config):
        if values[entry.name] in (None, []) and entry.default is dataclasses.MISSING:
            unset = f"{flag(entry.name)} is not set: {entry.metadata['help']}"
            raise ConfigError(entry.metadata["unset"] or unset)
        if isinstance(values[entry.name], list):
            values[entry.name] = tuple(values[entry.name])
            if hints[entry.name] == tuple[Source, ...]:  # one argument may name several
                values[entry.name] = tuple(itertools.chain.from_iterable(values[entry.name]))
        hint = _required(hints[entry.name])
        if _is_choice(hint) and values[entry.name] is not None:
            if values[entry.name] not in list(hint):  # argparse does not check defaults
                raise ConfigError(
                    f"{flag(entry.name)} is {values[entry.name]}, expected one of {', '.join(hint)}"
                )
            values[entry.name] = hint(values[entry.name])
    parsed = config(**values)
    if profile:
        log.info("%s", profile)
    return parsed


def _argument_type(hint: Any) -> dict[str, Any]:
    """Return the keyword arguments of add_argument for a field of this type."""
    hint = _required(hint)
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if _is_choice(hint):
        return {"choices": [member.value for member in hint]}
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return {
            "nargs": "*",
            "type": read_argument if item is Source else item,
            "metavar": "SOURCE" if item is Source else "SPEC",
        }
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _required(hint: Any) -> Any:
    """Return T for T | None, and any other type as it is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint)[0] if is_union else hint


def _is_choice(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Choice)
