"""A trained adapter merged into the model that it was trained on, one tensor at a time.

    LoRA         W + (alpha / rank) B A, in float32, rounded once to the model's stored dtype
    embeddings   the trained matrices in place of the old ones
    the rest     as it is

Memory holds the adapter and one shard of the result, whatever the model's size. The result has the
names, shapes and dtypes of the model it came from, which is checked on the written files.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import GlmForCausalLM

from chatglm_ja.chatglm3 import loading, tokenizer_files, weights
from chatglm_ja.errors import DataError

ADAPTER = "adapter"
MAX_SHARD_BYTES = 2 * 10**9
# Names in an adapter are those in the model with this before them.
PEFT_PREFIX = "base_model.model."
CONFIGS = ("config.json", "generation_config.json")
VERIFIED_IDS = 64  # ids that both models read for `verify_logits`, over the whole vocabulary
# Differences of logits, of the largest: what another order of sums makes in float32, deep models
# included. A merge that is wrong differs by far more.
ROUNDING = 1e-3


def write_merged(model_dir: Path, output_dir: Path) -> None:
    """Merge `output_dir`/adapter into the model of `model_dir` and write it to `output_dir`.

    The adapter is read back from the disk, so what is merged is what was saved; the model's stored
    dtype is kept. The folder loads with plain `AutoModelForCausalLM` and `AutoTokenizer`. Raises
    DataError when adapter and model do not fit, or a written tensor is not as it should be.
    """
    folder = output_dir / ADAPTER
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    adapter = load_file(folder / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights.iterate_tensors(model_dir):
            weight = adapter.pop(PEFT_PREFIX + name, None)
            module = PEFT_PREFIX + name.removesuffix(".weight")
            down = adapter.pop(f"{module}.lora_A.weight", None)
            up = adapter.pop(f"{module}.lora_B.weight", None)
            if weight is not None:
                if weight.shape != tensor.shape:
                    raise DataError(
                        f"{folder}: {name} has shape {tuple(weight.shape)}, but {model_dir} has "
                        f"{tuple(tensor.shape)}"
                    )
                tensor = weight.to(tensor.dtype)
            elif down is not None or up is not None:
                if down is None or up is None:
                    raise DataError(f"{folder} holds one of the two LoRA matrices of {name}")
                update = scale * (up.float() @ down.float())
                tensor = (tensor.float() + update).to(tensor.dtype)
            yield name, tensor

    tensors = tqdm(merged(), desc="merging", unit=" tensors")
    weights.write_sharded(tensors, output_dir, MAX_SHARD_BYTES)
    if adapter:
        raise DataError(f"{folder} holds {min(adapter)}, which {model_dir} has no place for")
    for name in CONFIGS:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, output_dir / name)
    tokenizer_files.copy_tokenizer_files(model_dir, output_dir)
    _verify_shapes(model_dir, output_dir)


def _verify_shapes(model_dir: Path, output_dir: Path) -> None:
    """Reopen what was written: fully trained embeddings have been saved empty by others."""
    before, after = (weights.describe_tensors(folder) for folder in (model_dir, output_dir))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise DataError(
                f"{output_dir}: {name} was written as {after.get(name)}, expected "
                f"{before.get(name)}"
            )


@torch.inference_mode()
def verify_logits(model_dir: Path, output_dir: Path) -> float:
    """The largest difference of logits between the merged model and model plus adapter.

    In float32, relative to the largest logit. Raises DataError when it is more than rounding every
    weight to the stored dtype explains.
    """

    def logits(folder: Path, adapter: Path | None) -> torch.Tensor:
        model: Any = loading.load_glm(folder, GlmForCausalLM, torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        ids = torch.linspace(0, model.config.vocab_size - 1, VERIFIED_IDS).long()
        return model.eval()(ids[None]).logits

    expected = logits(model_dir, output_dir / ADAPTER)
    found = logits(output_dir, None)
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    dtypes = {dtype for dtype, _ in weights.describe_tensors(output_dir).values()}
    # Every weight was rounded to the stored dtype.
    stored = max(torch.finfo(weights.DTYPES[dtype]).eps for dtype in dtypes)
    allowed = max(8 * stored, ROUNDING)
    if not difference <= allowed:
        raise DataError(
            f"{output_dir}: logits of the merged model differ from those of model plus adapter by "
            f"{difference:.1e} of the largest, expected at most {allowed:.1e}"
        )
    return difference
