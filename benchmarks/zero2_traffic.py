"""Count the bytes that ZeRO-2 sends per optimizer step, with DeepSpeed's own communication log.

Trains a few steps of step 5 in two processes, with one micro-batch per step and with two for the
same global batch, with ds_zero2.json and with DeepSpeed's own way of reducing gradients: all of
them to all processes. In a ring of n processes, each sends (n - 1) / n of what is reduced to its
owner, twice that of what is reduced to all, and (n - 1) times its part of what is gathered. To
exclude the traffic of startup and saving, each configuration runs with two numbers of steps; the
difference is the traffic of the additional steps.

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

# In this folder; importing it makes the project's package importable.
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
    parser.add_argument("--block-size", type=int, required=True, help="tokens per block")
    parser.add_argument("--micro-batch-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--to-all", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.micro_batch_size:
        train_and_count(options)
        return
    rows, ratios = [], []
    for passes in (1, 2):
        sums = {}
        for where in ("owner", "all"):
            flags = ["--to-all"] * (where == "all")
            sent = per_step(GLOBAL_BATCH // PROCESSES // passes, flags)
            gradients, reduced, gathered = (f"{size / 1e6:.2f} MB" for size in sent.values())
            sums[where] = sent["reduced"] + sent["gathered"]
            rows.append([str(passes), where, gradients, reduced, gathered])
        what = f"sent in a step of {passes} pass{'es' * (passes > 1)}, to that if reduced to all"
        ratios.append(Ratio(what, sums["owner"] / sums["all"]))
    print("Sent by one process in an optimizer step\n")
    print(measuring.table(["passes", "reduced to", "gradients", "to reduce", "to gather"], rows))
    measuring.conclude(ratios)


def per_step(micro_batch_size: int, flags: list[str]) -> dict[str, float]:
    """Return the bytes of all gradients, and those that a step sends to reduce and to gather."""
    fewer, more = (in_processes(micro_batch_size, steps, flags) for steps in STEPS)
    sent = {k: (more[k] - fewer[k]) / (STEPS[1] - STEPS[0]) for k in ("reduced", "gathered")}
    return {"gradients": more["gradients"], **sent}


def in_processes(micro_batch_size: int, steps: int, flags: list[str]) -> dict[str, float]:
    """Train under torchrun; return the bytes sent in the whole run."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES)]
    command = [*torchrun, "--master_port", "29531", *sys.argv]
    command += ["--micro-batch-size", str(micro_batch_size), "--steps", str(steps), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def train_and_count(options: argparse.Namespace) -> None:
    """Train as one process of the run; rank 0 prints the bytes sent."""
    from deepspeed import comm

    from chatglm_ja.training import train
    from chatglm_ja.training.settings import TrainingConfig

    settings: dict[str, Any] = json.loads((PROJECT / "ds_zero2.json").read_text(encoding="utf-8"))
    if options.to_all:
        del settings["zero_optimization"]["use_multi_rank_bucket_allreduce"]
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
    handled = {
        operation: sum(size * counts[0] for size, counts in sizes.items())
        for operation, sizes in comm.comm.comms_logger.comms_dict.items()
    }
    others = PROCESSES - 1
    sent = {
        "gradients": trained * 4,  # float32 on a CPU
        "reduced": others / PROCESSES * (handled.get("reduce", 0) + 2 * handled["all_reduce"]),
        "gathered": others * handled["all_gather_into_tensor"],
    }
    print(json.dumps(sent))


if __name__ == "__main__":
    main()
