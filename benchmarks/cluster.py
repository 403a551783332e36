"""Measure what a Ray cluster adds to step 4: two processes against two machines of one core each.

Both prepare the same texts, from their files to shards, in turn, --repeats times. The machines are
raylets on this one, whose start is not measured; that of the processes that tokenize is, and so are
the checks of the machines. CPU seconds are of all processes together, including Ray's own.

    python benchmarks/cluster.py --tokenizer STEP2_DIR --sources ja=ja.jsonl zh=zh.jsonl en=en.jsonl

Documents of randomly drawn lines of the sources make --megabytes of text, in uncompressed files, of
which processes read their parts themselves, and in .gz files, of which the caller sends the text.
The last line is how fast the caller cuts the files into chunks, which bounds any number of CPUs.
"""

import argparse
import dataclasses
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# In this folder; importing them makes the project's package importable.
import data
import measuring
import psutil
from measuring import Ratio
from tqdm import tqdm

from chatglm_ja.cli import run
from chatglm_ja.data import cluster, readers
from chatglm_ja.sources import Source

POOL, RAY = "2 processes", "Ray, 2 machines"
CORES = 2


def measure(way: str, folder: Path, sources: list[Source], output: Path) -> dict[str, float]:
    """Prepare the texts in one of the ways; return wall and CPU seconds."""
    config = data.settings(folder, sources, num_processes=CORES)
    if way == RAY:
        import ray
        from ray.cluster_utils import Cluster

        os.environ.update(RAY_worker_niceness="0")  # as a pool's processes have
        machines = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        machines.add_node(num_cpus=1)
        machines.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = machines.address
    start, cpu_start = time.perf_counter(), cpu_seconds()
    if way == RAY:
        cluster.connect(output)
    data.prepare(config, output)
    found = {"wall": time.perf_counter() - start, "cpu": cpu_seconds() - cpu_start}
    if way == RAY:
        ray.shutdown()
        machines.shutdown()
    return found


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of all that it started, running or ended."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def compress(sources: list[Source]) -> list[Source]:
    """Write a .gz file beside each source's; return these sources."""
    made = []
    for source in sources:
        path = Path(f"{source.path}.gz")
        path.write_bytes(gzip.compress(Path(source.path).read_bytes(), 6))
        made.append(dataclasses.replace(source, path=str(path)))
    return made


def compare(arguments: argparse.Namespace, sources: list[Source], kind: str) -> list[list[str]]:
    """Return the rows of both ways, and of their ratio."""
    own = [sys.executable, __file__, "--tokenizer", str(arguments.tokenizer)]
    own += ["--sources", *map(str, sources), "--way"]
    found: dict[str, list[dict[str, Any]]] = {POOL: [], RAY: []}
    for _ in tqdm(range(arguments.repeats), desc=kind):
        for way in found:
            with tempfile.TemporaryDirectory() as name:
                found[way].append(data.in_own_process([*own, way], None, Path(name)))
    medians = {
        way: [statistics.median(run[unit] for run in runs) for unit in ("wall", "cpu")]
        for way, runs in found.items()
    }
    rows = [[way, kind, *(f"{value:.2f}" for value in medians[way])] for way in found]
    ratios = [b / a for a, b in zip(medians[POOL], medians[RAY], strict=True)]
    return [*rows, ["ratio", kind, *(f"**{ratio:.2f}**" for ratio in ratios)]]


def cutting_rate(sources: list[Source], megabytes: int) -> float:
    """Return how many of the megabytes are cut into chunks in a second of CPU time."""
    start = time.process_time()
    for source in sources:
        for _ in readers.read_chunks(source):
            pass
    return megabytes / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="step 2's folder")
    parser.add_argument("--sources", nargs="+", type=Source.parse, required=True)
    parser.add_argument("--megabytes", type=int, default=120, help="of text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=(POOL, RAY), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        with tempfile.TemporaryDirectory(dir=os.environ["BENCHMARK_DIR"]) as name:
            found = measure(arguments.way, arguments.tokenizer, arguments.sources, Path(name))
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        made = data.make_text(arguments.sources, arguments.megabytes * 10**6, Path(name))
        packed = compress(made)
        rates = [cutting_rate(sources, arguments.megabytes) for sources in (made, packed)]
        rows = compare(arguments, made, "uncompressed") + compare(arguments, packed, ".gz")
    print(measuring.table(["", "files", "wall s", "CPU s"], rows))
    print(
        f"\nIn a second of CPU time, {rates[0]:.0f} MB of uncompressed files and {rates[1]:.0f} MB "
        "of text of .gz files are cut into chunks."
    )
    ratios = [
        Ratio(f"step 4 on Ray, to {POOL}: CPU, {row[1]}", float(row[3].strip("*")))
        for row in rows
        if row[0] == "ratio"
    ]
    measuring.conclude(ratios)


if __name__ == "__main__":
    run(main)
