"""Count the trials of the fault tests and write them into the tables of docs/reliability.md.

Each table lies between two markers, <!-- kills --> and <!-- end of kills -->. The rest of the page
is written by hand.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# The headings of each table: fault, number of trials, and expected outcome.
TABLES = {
    "checkpoints": ("Fault in the newest checkpoint", "Trials", "Same final weights"),
    "kills": ("SIGKILL in", "Trials", "Byte-identical after resuming"),
    "disk": ("Disk full in", "Trials", "Nothing lost, next run succeeds"),
    "processes": ("Of two processes", "Trials", "Ended and resumed"),
    "numbers": ("Numerical fault", "Trials", "Skipped or stopped"),
    "input": ("Bad input", "Trials", "One line, no traceback"),
    "fuzz": ("External input", "Trials", "Read, or refused with a named error"),
    "security": ("Attack", "Trials", "Refused or harmless"),
}


@dataclass
class Row:
    """The trials of one fault."""

    tried: int = 0
    recovered: int = 0
    reads: str = ""  # the message that the user reads


class Ledger:
    """Count trials; one that raises counts as tried but not as recovered."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, Row]] = {name: {} for name in TABLES}

    @contextmanager
    def trial(self, table: str, fault: str) -> Iterator[Row]:
        """Count one trial of `fault`; the block sets the row's `reads`."""
        row = self.tables[table].setdefault(fault, Row())
        row.tried += 1
        yield row
        row.recovered += 1

    def write(self, path: Path) -> None:
        """Replace the tables of this session in the page; leave the others unchanged."""
        text = path.read_text(encoding="utf-8")
        for name, rows in self.tables.items():
            if not rows:
                continue
            cells = [
                (*TABLES[name], "Message"),
                ("---", "---:", "---:", "---"),
                *(
                    (fault, f"{row.tried:,}", f"{row.recovered:,}", _format_message(row.reads))
                    for fault, row in [*rows.items(), ("**total**", _sum_rows(rows.values()))]
                ),
            ]
            lines = "\n".join(f"| {' | '.join(row)} |" for row in cells)
            start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            before, _, rest = text.partition(start)
            _, marker, after = rest.partition(end)
            if not marker:
                raise ValueError(f"{path} has no markers {start} and {end}")
            text = f"{before}{start}\n\n{lines}\n\n{end}{after}"
        path.write_text(text, encoding="utf-8")


def _sum_rows(rows: Iterable[Row]) -> Row:
    rows = list(rows)
    return Row(sum(row.tried for row in rows), sum(row.recovered for row in rows))


def _format_message(line: str) -> str:
    """Return a message as Markdown code, without its time and without the test's folders."""
    line = re.sub(r"^\d\d:\d\d:\d\d ", "", line.strip())
    line = re.sub(r"(?:/[\w.+-]+)+/([\w.*+-]+)", r"…/\1", line).replace("|", "\\|")
    return f"`{line}`" if line else ""
