"""Shared code of the benchmarks: import path, command lines of the steps, tables, and results.

A benchmark is a stand-alone program. It prints its tables as Markdown and ends with one line of
JSON, from which run.py writes docs/benchmarks.md. The line holds the benchmark's ratios, each with
its goal if there is one, the versions of the programs it compares with, and other figures.

Importing this module loads only the standard library. A benchmark that measures its children's
memory must stay small itself, and one benchmark runs under the interpreter of another environment.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))


@dataclass(frozen=True)
class Ratio:
    """A measured figure divided by another one from the same run, and its goal."""

    what: str
    value: float
    aim: str = ""


def step_command(name: str, output: Path, **paths: Path) -> list[str]:
    """Return the command line of one of the seven steps."""
    inputs = [f"--{flag.replace('_', '-')}={path}" for flag, path in paths.items()]
    return [sys.executable, str(PROJECT / f"{name}.py"), f"--output-dir={output}", *inputs]


def make(name: str, output: Path, *flags: str, **paths: Path) -> None:
    """Run a step unless its output is finished. Raises DataError if it fails."""
    from chatglm_ja.errors import DataError
    from chatglm_ja.storage.files import MANIFEST

    if (output / MANIFEST).is_file():
        return
    command = [*step_command(name, output, **paths), *flags]
    if subprocess.run(command, check=False).returncode:
        raise DataError(f"{name} failed: {' '.join(command)}")


def emptied(folder: Path) -> Path:
    """Create an empty folder, replacing an existing one; rename it once it is complete."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with the first column left-aligned and the others right-aligned."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(head) - 1) + "|")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """Return the mean and, of several values, its standard error."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def conclude(
    ratios: Iterable[Ratio],
    versions: Mapping[str, Mapping[str, str]] | None = None,
    **figures: Any,
) -> None:
    """Print the final line of JSON; `versions` are those of the programs compared with."""
    found = {"ratios": [asdict(ratio) for ratio in ratios], "versions": versions or {}}
    print(json.dumps(found | figures))
