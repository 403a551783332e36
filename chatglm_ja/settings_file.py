"""All settings of a step in one YAML file: read with --config, and written beside every result.

    python step5_train_pt.py --config artifacts/demo/step5_pt/settings.yaml --lora-rank 32 \\
        --output-dir artifacts/rank_32

A file has the names of the flags, with underscores, and may leave out any. Flags win over the file,
and the file over the profile. Sources are written as in a YAML file of sources (sources.py).
"""

import dataclasses
import reprlib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatglm_ja.errors import ConfigError, did_you_mean
from chatglm_ja.sources import Source, as_entry, load_yaml, read_entry

SETTINGS_FILE = "settings.yaml"
# What a run does besides its settings.
_CONTROLS = frozenset(("overwrite", "check", "estimate"))


def flag(name: str) -> str:
    """Return the flag of a setting: --learning-rate for learning_rate."""
    return "--" + name.replace("_", "-")


def read(path: Path, hints: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the settings of a file as command-line arguments, and those that have no such form.

    These are sources, and settings that are explicitly null. `hints` are the types of the step's
    settings. Raises ConfigError if the file cannot be read or has a setting of another step.
    """
    entries = load_yaml(path, ConfigError)
    if not isinstance(entries, Mapping):
        raise ConfigError(
            f"{path} is {reprlib.repr(entries)}: expected settings, NAME: VALUE on each line"
        )
    arguments: list[str] = []
    others: dict[str, Any] = {}
    for key, value in entries.items():
        name = str(key)
        if name not in hints:
            raise ConfigError(
                f"{path} has {name}, which is not a setting of this step{did_you_mean(name, hints)}"
            )
        if value is None:
            others[name] = () if typing.get_origin(hints[name]) is tuple else None
        elif hints[name] == tuple[Source, ...]:
            others[name] = tuple(_read_sources(path, name, value))
        else:
            arguments += _as_arguments(path, name, value)
    return arguments, others


def _read_sources(path: Path, name: str, entries: Any) -> Iterator[Source]:
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: {name} is {reprlib.repr(entries)}, expected a list of sources")
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, str):
            yield Source.parse(entry)
        else:
            yield read_entry(entry, f"{path}: {name} {number}")


def _as_arguments(path: Path, name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) for item in values):
        raise ConfigError(f"{path}: {name} is {reprlib.repr(value)}, expected text or numbers")
    if isinstance(value, list):
        return [flag(name), *map(str, values)]
    return [f"{flag(name)}={value}"]


def dump(config: Any, step: str) -> str:
    """Return the content of a file with all settings of a step."""
    import yaml

    values = {
        entry.name: _plain(getattr(config, entry.name))
        for entry in dataclasses.fields(config)
        if entry.name not in _CONTROLS
    }
    head = f"# To repeat the run, or a changed one: python {step}.py --config {SETTINGS_FILE}\n"
    return head + yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


def _plain(value: Any) -> Any:
    """Return a setting as YAML's types."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Source):
        return as_entry(value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)
