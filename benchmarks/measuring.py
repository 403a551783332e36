"""What the benchmarks share: the project on the import path, the steps' command lines, Markdown
tables, and the last line of each, from which run.py makes docs/benchmarks.md.

A benchmark is a program of its own. It prints its tables as Markdown and ends with one line of
JSON: the ratios by which it judges, each with the aim that was set for it if there was one, the
versions of other programs it compares with, and whatever else it found.

What measures the memory of its children must stay small itself, and one file is run by the
interpreter of another environment: nothing but the standard library is imported here.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))


@dataclass(frozen=True)
class Ratio:
    """One measured figure divided by another one of the same run."""

    what: str
    value: float
    aim: str = ""


def step_command(name: str, output: Path, **paths: Path) -> list[str]:
    """The command line of one of the seven steps."""
    inputs = [f"--{flag.replace('_', '-')}={path}" for flag, path in paths.items()]
    return [sys.executable, str(PROJECT / f"{name}.py"), f"--output-dir={output}", *inputs]


def emptied(folder: Path) -> Path:
    """The folder, with nothing in it: to be filled, and renamed when it is whole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown: the first column to the left, figures to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(head) - 1) + "|")
    return "\n".join(lines)


def conclude(
    ratios: Iterable[Ratio],
    versions: Mapping[str, Mapping[str, str]] | None = None,
    **figures: Any,
) -> None:
    """Print the last line; `versions` are those of the programs that were compared with."""
    found = {"ratios": [asdict(ratio) for ratio in ratios], "versions": versions or {}}
    print(json.dumps(found | figures))
