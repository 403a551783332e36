"""Time a step's `--help`, and `--check` on a finished step.

Each command is a separate process and runs --rounds times. The first run, which reads the libraries
from disk, does not count. The output shows medians. Steps 1 to 5 of the demo must have run.

    python benchmarks/startup.py
"""

import argparse
import statistics
import subprocess
import sys
import time

from measuring import PROJECT, Ratio, conclude, table

STEPS = sorted(path.stem for path in PROJECT.glob("step[1-7]_*.py"))
FINISHED = STEPS[:5]


def seconds(command: list[str], rounds: int) -> float:
    """Return the median time of a command, which must succeed."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command (default: 5)")
    rounds = parser.parse_args().rounds
    shown: dict[str, float] = {}
    rows = []
    for step in STEPS:
        command = [sys.executable, str(PROJECT / f"{step}.py")]
        shown[step] = seconds([*command, "--help"], rounds)
        checked = f"{seconds([*command, '--check'], rounds):.2f}" if step in FINISHED else ""
        rows.append([f"`{step}.py`", f"{shown[step]:.2f}", checked])
    print(f"Seconds, medians of {rounds} runs\n")
    print(table(["step", "`--help`", "`--check`, finished"], rows))
    slowest = max(shown.values())
    conclude([Ratio("slowest `--help` of the steps, to one second", slowest, "below 1")])


if __name__ == "__main__":
    main()
