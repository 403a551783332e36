"""Time how LLaMA-Factory 0.9.5 prepares pretraining data: load, tokenize, pack, save to disk.

This is the baseline for step 4. It calls LLaMA-Factory's own functions as `llamafactory-cli train`
does for `stage: pt` with `tokenized_path`: its argument parser (which turns packing on),
load_tokenizer, and get_dataset. get_dataset reads the .jsonl files (one {"text": ...} per line),
appends the end token to every document, tokenizes, cuts blocks of --cutoff-len tokens, and writes
an Arrow data set. Only get_dataset is timed, not imports or loading the tokenizer. The template is
LLaMA-Factory's placeholder "empty", because stage pt formats nothing.

LLaMA-Factory pins older libraries than this project, so it needs its own environment. The
torchvision and torchaudio that it pulls in cannot be imported with a CPU build of torch. It runs
without torchvision, and accepts an empty module as torchaudio:

    python3.11 -m venv lf
    lf/bin/pip install torch==2.13.0 llamafactory==0.9.5
    lf/bin/pip uninstall -y torchvision torchaudio
    touch lf/lib/python3.11/site-packages/torchaudio.py

    lf/bin/python benchmarks/llamafactory_data.py --tokenizer STEP2_DIR \\
        --files docs_ja.jsonl docs_zh.jsonl docs_en.jsonl --output-dir NEW_DIR

Prints one line of JSON; the libraries' own output goes to stderr. Hugging Face's caches are in a
temporary folder, so they are cold in every run. The file system's cache is warm, because the texts'
bytes are counted first.

With --workers 1, LLaMA-Factory tokenizes in its only process, where the tokenizers library uses
every available core. With more workers, each has one thread. To measure a single core, bind the
process to it (Linux: `taskset -c 0 lf/bin/python ...`).
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def count_text_bytes(files: list[Path]) -> int:
    """Return the UTF-8 bytes of the texts."""
    total = 0
    for file in files:
        with open(file, encoding="utf-8") as lines:
            total += sum(len(json.loads(line)["text"].encode()) for line in lines if line.strip())
    return total


def set_environment(scratch: Path) -> None:
    """Set the variables that libraries read at import; call it before the first import."""
    os.environ |= {
        "HF_HOME": str(scratch / "huggingface"),
        "HF_DATASETS_CACHE": str(scratch / "huggingface" / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # with several GPUs it requires a distributed launch
        "LLAMAFACTORY_VERBOSITY": "WARNING",
    }


def write_dataset_info(files: list[Path], folder: Path) -> list[str]:
    """Declare each file to LLaMA-Factory as a data set; return the names."""
    described = {
        f"file_{number}": {"file_name": str(file.resolve()), "columns": {"prompt": "text"}}
        for number, file in enumerate(files)
    }
    (folder / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    return list(described)


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Prepare the files once; return the measurements."""
    set_environment(scratch)
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, training_args, _, _ = get_train_args(
        {
            "stage": "pt",
            "model_name_or_path": str(options.tokenizer),
            "template": "empty",
            "dataset_dir": str(scratch),
            "dataset": ",".join(write_dataset_info(options.files, scratch)),
            "cutoff_len": options.cutoff_len,
            "preprocessing_num_workers": options.workers,
            "overwrite_cache": True,
            "tokenized_path": str(options.output_dir),
            "output_dir": str(scratch / "trainer"),
            "report_to": "none",
        }
    )
    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    size = count_text_bytes(options.files)

    start = time.perf_counter()
    data = get_dataset(
        template, model_args, data_args, training_args, stage="pt", **tokenizer_module
    )
    seconds = time.perf_counter() - start

    blocks = len(data["train_dataset"])
    return {
        "seconds": round(seconds, 3),
        "bytes": size,
        "mb_per_s": round(size / 1e6 / seconds, 3),
        "tokens": blocks * options.cutoff_len,  # every block is full: it drops the remainder
        "blocks": blocks,
        "llamafactory": importlib.metadata.version("llamafactory"),
        "workers": options.workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder that AutoTokenizer loads"
    )
    parser.add_argument("--files", type=Path, nargs="+", required=True, help=".jsonl files")
    parser.add_argument(
        "--cutoff-len", type=int, default=1024, help="tokens per block (default: 1024)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="value of preprocessing_num_workers (default: 1)"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="new or empty folder")
    options = parser.parse_args()
    for path in (options.tokenizer, *options.files):
        if not path.exists():
            parser.error(f"{path} does not exist")
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        # LLaMA-Factory would load the existing files and prepare nothing.
        parser.error(f"{options.output_dir} is not empty: choose another --output-dir")

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        result = measure(options, Path(scratch))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
