"""Measure step 3's peak memory and time at the size of ChatGLM3-6B, against copying the files.

Writes a checkpoint of random float16 weights with the shapes that DIR/config.json gives (12.5 GB in
7 shards for ChatGLM3-6B), runs step 3 on it in its own process, and copies the checkpoint with cp
and sync, in turn. Needs twice the checkpoint's size in disk space, less if --work-dir already has
the checkpoint.

    python benchmarks/resize_6b.py --base-model DIR --tokenizer STEP2_DIR --work-dir SCRATCH
"""

import argparse
import json
import math
import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path

# In this folder; importing it makes the project's package importable.
import measuring
import torch
from measuring import Ratio, step_command
from safetensors.torch import save_file
from tqdm.auto import tqdm

from chatglm_ja.chatglm3 import tensor_names, tokenizer
from chatglm_ja.chatglm3.base_config import read_config
from chatglm_ja.cli import run
from chatglm_ja.errors import DataError
from chatglm_ja.storage import weights

SHARDS = 7
# Right after files were removed, cp ran up to three times as fast as seconds later on the virtual
# machine where this was measured; step 3, which first imports its libraries, would not.
PAUSE_SECONDS = 10


def write_random_checkpoint(source: Path, folder: Path) -> None:
    for name in ("config.json", tokenizer.MODEL_FILE):
        shutil.copyfile(source / name, folder / name)
    shapes = tensor_names.expected_shapes(read_config(folder))
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).half()
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    shard = written = 0
    for name, shape in tqdm(shapes.items(), desc="random checkpoint", unit=" tensors"):
        size = math.prod(shape)
        tensor = noise.repeat(-(-size // len(noise)))[:size].reshape(shape)
        tensor.view(-1)[0] = len(weight_map) + len(pending)  # makes all tensors different
        pending[name] = tensor
        written += tensor.nbytes
        if written >= total * (shard + 1) / SHARDS or len(weight_map) + len(pending) == len(shapes):
            shard += 1
            file = f"model-{shard:05d}-of-{SHARDS:05d}.safetensors"
            save_file(pending, folder / file)
            weight_map |= dict.fromkeys(pending, file)
            pending = {}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / weights.INDEX_FILE).write_text(text, encoding="utf-8")


def timed(command: list[str]) -> float:
    """Run a command once the disk is idle and freed memory is settled; return its seconds."""
    subprocess.run(["sync"], check=True)
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-model", type=Path, required=True, help="folder with config.json and tokenizer.model"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="output folder of step 2")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder on a large disk")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; medians are shown")
    arguments = parser.parse_args()
    base = arguments.work_dir / "random_base"
    if not base.exists():
        shapes = tensor_names.expected_shapes(read_config(arguments.base_model))
        needed = 2.2 * 2 * sum(math.prod(shape) for shape in shapes.values())
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(arguments.work_dir).free
        if free < needed:
            raise DataError(
                f"{arguments.work_dir} has {free / 1e9:.0f} GB free, and {needed / 1e9:.0f} GB are "
                "needed: choose another --work-dir"
            )
        unfinished = measuring.emptied(base.with_suffix(".unfinished"))
        write_random_checkpoint(arguments.base_model, unfinished)
        unfinished.rename(base)

    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    copy, output = arguments.work_dir / "copy", arguments.work_dir / "resized"
    paths = {"base_model": base, "tokenizer": arguments.tokenizer}
    step = step_command("step3_resize_model", output, **paths)
    times: list[tuple[float, float]] = []  # of cp and of step 3
    for _ in range(arguments.repeats):
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
        copied = timed(["bash", "-c", f"cp -r '{base}' '{copy}' && sync"])
        shutil.rmtree(copy)
        times.append((copied, timed(step)))
    copying, seconds = map(statistics.median, zip(*times, strict=True))
    ratio = statistics.median(made / copied for copied, made in times)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    rows = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["counts"]["new_rows"]
    hidden = read_config(base)["hidden_size"]
    bound = max(shards) + 2 * rows * hidden * 2 + 1e9
    print(f"checkpoint: {sum(shards) / 1e9:.1f} GB in {len(shards)} shards; {rows:,} rows after\n")
    head = ["", "step 3", "beside it"]
    print(
        measuring.table(
            head,
            [
                ["time", f"{seconds:.0f} s", f"{copying:.0f} s: `cp` and `sync` of the same files"],
                [
                    "peak memory",
                    f"{peak / 1e9:.2f} GB",
                    f"{bound / 1e9:.2f} GB: largest shard, two new matrices and 1 GB",
                ],
            ],
        )
    )
    shutil.rmtree(output)
    measuring.conclude(
        [
            Ratio("time of step 3, to copying the files", ratio, "below 2"),
            Ratio("peak memory of step 3, to its bound", peak / bound, "below 1"),
        ]
    )


if __name__ == "__main__":
    run(main)
