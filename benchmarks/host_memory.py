"""Measure the host memory that one, two and four processes take to load the model for training.

The processes load at the same time, by adapter.load_for_training, which step 5 calls. A model of
random weights, stored in float16 and computed in bfloat16 as ChatGLM3-6B is, and with embeddings
of a tenth of its size, is loaded

    into host memory, converted   as for a run on the CPU, or to be moved to a GPU afterwards
    to the device                 as for a run on a GPU. Torch's "meta" device stands in for it: a
                                  tensor is read where it would be copied to a GPU, and stays mapped
    into host memory, as stored   as for a run on the CPU in float16

The figures are the peak of the processes' PSS, added up, less what they take before they load. PSS
divides the pages that processes share, such as those of mapped files, among them.

    python benchmarks/host_memory.py --work-dir DIR
"""

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
import measuring
from measuring import Ratio
from train_6b import make_model

WAYS: dict[str, tuple[str, str]] = {  # the device, and the dtype of the computation
    "into host memory, converted": ("cpu", "bfloat16"),
    "to the device": ("meta", "bfloat16"),
    "into host memory, as stored": ("cpu", "float16"),
}
PROCESSES = (1, 2, 4)
INTERVAL_SECONDS = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for the model; kept")
    parser.add_argument("--layers", type=int, default=20, help="(default: 20)")
    parser.add_argument("--hidden", type=int, default=1024, help="width (default: 1024)")
    parser.add_argument("--rows", type=int, default=16_000, help="(default: 16000)")
    parser.set_defaults(tokenizer=None)
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    make_model(options)
    folder = options.work_dir / "model"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rows, ratios = [], []
    for way in WAYS:
        peaks = [peak_bytes(folder, way, processes) for processes in PROCESSES]
        copies = (peaks[-1] - peaks[0]) / size
        rows.append([way, *(f"{peak / 1e6:,.0f} MB" for peak in peaks), f"{copies:.2f}"])
        aim = "below 1" if way == "to the device" else ""
        ratios.append(Ratio(f"what three more processes take, {way}, to the model", copies, aim))
    print(f"Host memory to load a model of {size / 1e6:,.0f} MB\n")
    head = ["loaded", "one process", "two", "four", "three more, in copies"]
    print(measuring.table(head, rows))
    measuring.conclude(ratios)


def peak_bytes(folder: Path, way: str, processes: int) -> int:
    """Return the most memory that processes take together while they load, in bytes."""
    context = multiprocessing.get_context("spawn")
    ready, go, loaded = barriers = [context.Barrier(processes + 1) for _ in range(3)]
    started = [context.Process(target=load, args=(folder, way, barriers)) for _ in range(processes)]
    for process in started:
        process.start()

    def proportional_bytes() -> int:
        return sum(read_pss(process.pid) for process in started)

    ready.wait()
    before = peak = proportional_bytes()
    go.wait()
    while loaded.n_waiting < processes:
        peak = max(peak, proportional_bytes())
        if not all(process.is_alive() for process in started):
            raise SystemExit("a process has failed")
        time.sleep(INTERVAL_SECONDS)
    peak = max(peak, proportional_bytes())
    loaded.wait()
    for process in started:
        process.join()
    return peak - before


def read_pss(pid: int | None) -> int:
    """Return the proportional set size of a process in bytes."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


def load(folder: Path, way: str, barriers: Sequence[Any]) -> None:
    """Load the model in this process between the second of three barriers and the third."""
    import torch
    from transformers import core_model_loading

    from chatglm_ja.training import adapter
    from chatglm_ja.training.settings import TrainingConfig

    def read(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        """Read all of a tensor, as copying it to a GPU does; keep it mapped to the end."""
        mapped = tensor[...]
        mapped.view(torch.int16).max()
        kept.append(mapped)
        return mapped.to(device=device, dtype=dtype)

    kept: list[torch.Tensor] = []
    device, dtype = WAYS[way]
    if device == "meta":
        core_model_loading._materialize_copy = read
    config = TrainingConfig(model=folder, data=folder, output_dir=folder)
    ready, go, loaded = barriers
    ready.wait()  # imports do not count
    go.wait()
    model = adapter.load_for_training(config, getattr(torch, dtype), torch.device(device))
    loaded.wait()
    del model


if __name__ == "__main__":
    main()
