"""How many bytes ZeRO-2 sends per optimizer step, counted by DeepSpeed's own communication log.

Trains a few steps of step 5 in two processes, with one micro-batch per step and with the same
global batch in two, and compares the bytes of gradients that were reduced with the bytes of the
gradients that there are. DeepSpeed reduces after every micro-batch: with one a step the gradient
travels once. What a run sends besides, to start and to save its result, is left out: each is done
with two numbers of steps, and what the longer one sends more is that of its steps.

    python benchmarks/zero2_traffic.py --model artifacts/demo/step3_model \\
        --data artifacts/demo/step4_data --block-size 256
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Beside this file; it makes the project's package importable.
import measuring
from measuring import PROJECT, Ratio

PROCESSES = 2
STEPS = (2, 4)
GLOBAL_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="output folder of step 3")
    parser.add_argument("--data", type=Path, required=True, help="output folder of step 4")
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--micro-batch-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.micro_batch_size:
        train_and_count(options)
        return
    columns = ("gradients", "reduced", "gathered")
    rows, ratios = [], []
    for passes in (1, 2):
        found = per_step(GLOBAL_BATCH // PROCESSES // passes)
        share = found["reduced"] / found["gradients"]
        sizes = [f"{found[name] / 1e6:.2f} MB" for name in columns]
        rows.append([str(passes), *sizes, f"{share:.3f}"])
        aim = "1" if passes == 1 else ""
        what = f"gradients sent in a step of {passes} pass{'es' * (passes > 1)}, to all gradients"
        ratios.append(Ratio(what, share, aim))
    print("Of one process and optimizer step\n")
    print(measuring.table(["passes", *columns, "reduced / gradients"], rows))
    measuring.conclude(ratios)


def per_step(micro_batch_size: int) -> dict[str, float]:
    """Bytes that a step sends, and those of the gradients."""
    fewer, more = (in_processes(micro_batch_size, steps) for steps in STEPS)
    sent = {k: (more[k] - fewer[k]) / (STEPS[1] - STEPS[0]) for k in ("reduced", "gathered")}
    return {"gradients": more["gradients"], **sent}


def in_processes(micro_batch_size: int, steps: int) -> dict[str, float]:
    """Bytes of a run under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES)]
    command = [*torchrun, "--master_port", "29531", *sys.argv]
    command += ["--micro-batch-size", str(micro_batch_size), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def train_and_count(options: argparse.Namespace) -> None:
    """One process's part; number 0 prints the bytes that were sent."""
    from deepspeed import comm

    from chatglm_ja.training import train
    from chatglm_ja.training.settings import TrainingConfig

    settings: dict[str, Any] = json.loads((PROJECT / "ds_zero2.json").read_text(encoding="utf-8"))
    settings["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deepspeed.json")
        path.write_text(json.dumps(settings), encoding="utf-8")
        config = TrainingConfig(
            model=options.model,
            data=options.data,
            output_dir=Path(folder, "output"),
            block_size=options.block_size,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=options.micro_batch_size,
            max_steps=options.steps,
            evaluations=0,
            tracker="none",
            deepspeed=path,
        )
        trained = train.train(config, "pretrain", None)["trained_parameters"]
    if os.environ["RANK"] != "0":
        return
    sent = {
        operation: sum(size * counts[0] for size, counts in sizes.items())
        for operation, sizes in comm.comm.comms_logger.comms_dict.items()
    }
    reduced = sum(total for name, total in sent.items() if "reduce" in name)
    gathered = sum(total for name, total in sent.items() if "gather" in name)
    print(
        json.dumps(
            {
                "gradients": trained * 4,  # float32 on a CPU
                "reduced": reduced,
                "gathered": gathered,
            }
        )
    )


if __name__ == "__main__":
    main()
