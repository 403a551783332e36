"""Two processes of a run, of which one is lost or computes NaN."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.ledger import Ledger
from tests.faults.two_processes import BAD_STEP
from tests.pipeline import PROJECT, SMALL, Runner, error_of

STALL_SECONDS = 20
FLAGS = [*SMALL["step5_train_pt.py"].split(), "--evaluations", "0", "--max-steps", "12",
         "--save-steps", "2", "--stall-seconds", str(STALL_SECONDS)]  # fmt: skip
LOST = {
    "one is killed": (signal.SIGKILL, "another process of the run has ended"),
    "one is stopped": (signal.SIGSTOP, "another process of the run stands still"),
}


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def pid_of(rank: int, launcher: int) -> int:
    """The process of a rank, among the children of torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")


@pytest.fixture(scope="module")
def undisturbed(pipeline: Runner) -> Iterator[list[float]]:
    target = pipeline.root / "undisturbed12"
    result = pipeline.run("step5_train_pt.py", *FLAGS, "--output-dir", str(target))
    assert result.returncode == 0, result.stderr
    yield pipeline.losses(target, "loss")


@pytest.mark.parametrize("fault", LOST)
@pytest.mark.parametrize("rank", [1, 0])
def test_no_process_waits_for_a_lost_one(
    pipeline: Runner,
    ledger: Ledger,
    thorough: bool,
    undisturbed: list[float],
    request: pytest.FixtureRequest,
    fault: str,
    rank: int,
) -> None:
    if rank == 0 and not thorough:
        pytest.skip("--thorough tries the other process, too")
    number, message = LOST[fault]
    target = pipeline.root / f"lost-{number}-{rank}"
    process = subprocess.Popen(
        pipeline.command("step5_train_pt_multi_gpu.sh", *FLAGS, "--output-dir", str(target)),
        env=pipeline.environment | {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port()},
        stdout=subprocess.DEVNULL,  # if the test fails, what it started must not hold pytest's
        stderr=subprocess.PIPE,
        text=True,
    )
    request.addfinalizer(process.terminate)
    assert process.stderr is not None
    with ledger.trial("processes", fault) as row:
        # With rank 0 no line follows: it is the one that speaks.
        for line in process.stderr:
            if "step 4/12" in line:
                break
        lost = pid_of(rank, process.pid)
        os.kill(lost, number)
        started = time.monotonic()
        for line in process.stderr:
            if message in line:
                break
        waited = time.monotonic() - started
        assert message in line
        assert waited < STALL_SECONDS + 5
        if number == signal.SIGSTOP:
            os.kill(lost, signal.SIGKILL)  # as torchrun does after 30 seconds
        rest = process.stderr.read()
        assert process.wait(timeout=60) != 0
        assert "Traceback" not in line + rest
        saved = re.search(r"re-run the command to resume from step (\d+)", line)
        assert saved and int(saved[1]) >= 2
        row.reads = line
        again = pipeline.run("step5_train_pt.py", *FLAGS, "--output-dir", str(target))
        assert again.returncode == 0, again.stderr
        assert f"resuming from {target}.checkpoints/step-0000" in again.stderr
        assert pipeline.losses(target, "loss") == pytest.approx(undisturbed, rel=1e-5)


def run_two(pipeline: Runner, folder: Path, bad: str, *more: str) -> tuple[str, list[str]]:
    """Run step 5 in two processes; return the log, and digests of the weights by micro-batch."""
    flags = [*SMALL["step5_train_pt.py"].split(), "--max-steps", "5", "--evaluations", "0", *more]
    result = subprocess.run(
        [sys.executable, "-m", "chatglm_ja.training.launch", "--nproc_per_node", "2",
         "--master_port", free_port(), str(PROJECT / "tests/faults/two_processes.py"),
         bad, str(folder / f"{bad}-notes"), "--deepspeed", str(PROJECT / "ds_zero2.json"), *flags,
         "--output-dir", str(folder / f"{bad}-output")],
        env=pipeline.environment | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    notes = [(folder / f"{bad}-notes-{rank}").read_text().split() for rank in (0, 1)]
    assert notes[0] == notes[1]
    return result.stderr, notes[0]


@pytest.mark.parametrize("bad", ["loss", "gradients"])
def test_nan_in_one_process_changes_no_weight_in_any(
    pipeline: Runner, ledger: Ledger, thorough: bool, tmp_path: Path, bad: str
) -> None:
    if bad == "gradients" and not thorough:
        pytest.skip("--thorough tries gradients, too")
    with ledger.trial("numbers", f"NaN in the {bad} of one of two processes") as row:
        said, notes = run_two(pipeline, tmp_path, bad)
        (row.reads,) = re.findall(rf"step {BAD_STEP} is skipped.*", said)
        # Before every step; the first step has a learning rate of 0.
        same = [before == after for before, after in itertools.pairwise(notes)]
        assert same == [True, False, True, False]


def test_nothing_of_a_skipped_step_is_learned_later(
    pipeline: Runner, ledger: Ledger, thorough: bool, tmp_path: Path
) -> None:
    """DeepSpeed sums the gradients of micro-batches: those of the good one are dropped, too."""
    if not thorough:
        pytest.skip("--thorough tries it under DeepSpeed; tests/faults/test_numbers.py without")
    with ledger.trial(
        "numbers", "NaN in the second micro-batch of a step, in one of two processes"
    ):
        _, second = run_two(pipeline, tmp_path, "micro-batch", "--micro-batch-size", "2")
        _, both = run_two(pipeline, tmp_path, "loss", "--micro-batch-size", "2")
        assert second == both
        # Before the micro-batches of five steps, of which the first and the bad one change nothing.
        assert len(set(second)) == 3


def test_a_used_port_is_one_line(pipeline: Runner) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = pipeline.small(
            "step5_train_pt_multi_gpu.sh", "--output-dir", str(pipeline.root / "port"),
            NPROC_PER_NODE="2", MASTER_PORT=str(other.getsockname()[1]),
        )  # fmt: skip
    assert "set MASTER_PORT to a free one" in error_of(result)


def test_a_process_that_was_stopped_itself_continues() -> None:
    """Stopped for longer than --stall-seconds, as by Ctrl-Z."""
    program = (
        "import os, signal, threading, time\n"
        "from chatglm_ja.training.watchdog import Watchdog\n"
        "with Watchdog(3.0, lambda: 'start it again') as watch:\n"
        "    for _ in range(4):\n"
        "        print('at work', flush=True); watch.progress(); time.sleep(1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 0
