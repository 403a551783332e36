"""Running the steps as programs, with an artifact root of a test's own."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
STEPS = sorted(path.name for path in PROJECT.glob("step[1-8]_*.py"))

# Flags for a smaller demo, in which every step takes seconds.
SMALL = {
    "demo/build_base_model.py": "--vocab-size 3000 --hidden-size 64 --num-layers 2 --steps 8",
    "step1_train_tokenizer.py": "--vocab-size 2500",
    "step2_merge_tokenizer.py": "",
    "step3_resize_model.py": "",
    "step4_prepare_data.py": (
        "--total-tokens 20000 --validation-tokens 3000 --block-size 128 --sft-examples 60 "
        "--sft-validation-examples 10"
    ),
    "step5_train_pt.py": "--max-steps 4 --logging-steps 1 --evaluations 4 --block-size 128",
    "step6_train_sft.py": "--max-steps 4 --logging-steps 1 --evaluations 4 --max-new-tokens 4",
    "step7_eval.py": "--max-chars 1500 --max-new-tokens 4 --translations 2",
    "step8_export.py": "",
}


def free_port() -> str:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def child_cpu_seconds() -> float:
    """Return the CPU time of all finished child processes, which other load does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def flags_of(program: str) -> set[str]:
    """Return the flags that a program's --help lists."""
    command = [sys.executable, str(PROJECT / program), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = said.partition("\noptions:\n")[2].splitlines()
    # Flags are indented by two columns, their help texts by more.
    named = [re.split(r"  +", line.strip())[0] for line in lines if re.match(r"  -", line)]
    return {flag for line in named for flag in re.findall(r"--[\w-]+", line)}


class Runner:
    """Runs the project's programs with an artifact root of its own."""

    def __init__(self, artifacts: Path) -> None:
        self.root = artifacts
        self.folder = artifacts / "demo"
        self.said: dict[str, str] = {}  # what each step printed
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("CHATGLM")},
            "CHATGLM_JA_ARTIFACTS": str(artifacts),
            # Test on the CPU: on a GPU, bf16 would change the fourth digit.
            "CUDA_VISIBLE_DEVICES": "",
        }

    def command(self, script: str, *flags: str) -> list[str]:
        program = ["bash"] if script.endswith(".sh") else [sys.executable]
        return [*program, str(PROJECT / script), *flags]

    def run(self, script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(script, *flags),
            env=self.environment | environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def small(self, script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        name = script.replace("_multi_gpu.sh", ".py")
        return self.run(script, *SMALL[name].split(), *flags, **environment)

    def losses(self, folder: Path, kind: str) -> list[float]:
        """Return all training ("loss") or validation ("eval_") losses of a run, in order."""
        history = json.loads((folder / "history.json").read_text())
        return [
            value
            for entry in history
            for name, value in sorted(entry.items())
            if name == kind or (kind == "eval_" and name.startswith(kind))
        ]


def error_of(result: subprocess.CompletedProcess) -> str:
    """Return the one error line of a step that failed."""
    return only_error(result.returncode, result.stderr)


def only_error(status: int, said: str) -> str:
    """Return the one error line of a program, given its exit status and standard error."""
    assert status == 1, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    return lines[0]
