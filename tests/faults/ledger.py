"""What the fault tests found, as the tables of docs/reliability.md.

A table lies between two marks, <!-- kills --> and <!-- end of kills -->; the rest of the page is
written by hand.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Of every table: what its rows are, what a trial is, and what it should end with.
TABLES = {
    "checkpoints": ("Fault of the newest checkpoint", "Tried", "Same weights in the end"),
    "kills": ("SIGKILL in", "Tried", "Same bytes after the next run"),
    "disk": ("Disk full in", "Tried", "Nothing lost, next run succeeds"),
    "processes": ("Of two processes", "Tried", "Ended, and gone on with"),
    "numbers": ("What goes wrong with a number", "Tried", "Skipped or stopped"),
    "input": ("Bad input", "Tried", "One line, no traceback"),
    "fuzz": ("Read from outside", "Inputs", "Read, or refused by a named error"),
    "security": ("Attempt", "Tried", "Refused or harmless"),
}


@dataclass
class Row:
    tried: int = 0
    recovered: int = 0
    reads: str = ""  # what the user reads


class Ledger:
    """Counts trials; one that raises has been tried, and was not recovered from."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, Row]] = {name: {} for name in TABLES}

    @contextmanager
    def trial(self, table: str, fault: str) -> Iterator[Row]:
        row = self.tables[table].setdefault(fault, Row())
        row.tried += 1
        yield row
        row.recovered += 1

    def write(self, path: Path) -> None:
        """Put the tables of this session into the page; others stay."""
        text = path.read_text(encoding="utf-8")
        for name, rows in self.tables.items():
            if not rows:
                continue
            cells = [
                (*TABLES[name], "What the user reads"),
                ("---", "---:", "---:", "---"),
                *(
                    (fault, f"{row.tried:,}", f"{row.recovered:,}", _shown(row.reads))
                    for fault, row in [*rows.items(), ("**together**", _together(rows.values()))]
                ),
            ]
            lines = "\n".join(f"| {' | '.join(row)} |" for row in cells)
            start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            before, _, rest = text.partition(start)
            _, found, after = rest.partition(end)
            if not found:
                raise ValueError(f"{path} lacks the marks {start} and {end}")
            text = f"{before}{start}\n\n{lines}\n\n{end}{after}"
        path.write_text(text, encoding="utf-8")


def _together(rows: Iterable[Row]) -> Row:
    found = list(rows)
    return Row(sum(row.tried for row in found), sum(row.recovered for row in found))


def _shown(line: str) -> str:
    """A line without the time, and without the folders of this test."""
    line = re.sub(r"^\d\d:\d\d:\d\d ", "", line.strip())
    line = re.sub(r"(?:/[\w.+-]+)+/([\w.*+-]+)", r"…/\1", line).replace("|", "\\|")
    return f"`{line}`" if line else ""
