"""Merge a trained adapter into the model it was trained on, tensor by tensor.

    LoRA         W + (alpha / rank) B A, in float32, rounded once to the model's stored dtype
    embeddings   the trained matrices replace the stored ones
    the rest     copied

Memory holds the adapter and one shard of the result, whatever the size of the model. The result has
the model's names, shapes and dtypes, which is checked on the written files.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import GlmForCausalLM

from chatglm_ja.chatglm3 import tokenizer_files, weights
from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json

ADAPTER = "adapter"
MAX_SHARD_BYTES = 2 * 10**9
# An adapter's tensors have the names of the model's with this prefix.
PEFT_PREFIX = "base_model.model."
CONFIGS = ("config.json", "generation_config.json")
VERIFIED_IDS = 64  # input of `verify_logits`: ids spread over the whole vocabulary
# Allowed difference of logits, relative to the largest, for another order of sums in float32, also
# in deep models. A wrong merge differs by far more.
ROUNDING = 1e-3


def write_merged(model_dir: Path, output_dir: Path) -> None:
    """Merge `output_dir`/adapter into the model of `model_dir` and write it to `output_dir`.

    The adapter is read back from disk, so that what was saved is what is merged. The result keeps
    the model's stored dtype and loads with plain `AutoModelForCausalLM` and `AutoTokenizer`. Raises
    DataError if adapter and model do not fit, and if a tensor was written with another shape or
    dtype.
    """
    folder = output_dir / ADAPTER
    settings = read_json(folder / "adapter_config.json")
    adapter = load_file(folder / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]

    def merge() -> Iterator[tuple[str, torch.Tensor]]:
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

    tensors = tqdm(merge(), desc="merging", unit=" tensors")
    weights.write_sharded(tensors, output_dir, MAX_SHARD_BYTES)
    if adapter:
        raise DataError(f"{folder} holds {min(adapter)}, which {model_dir} has no place for")
    for name in CONFIGS:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, output_dir / name)
    tokenizer_files.copy_tokenizer_files(model_dir, output_dir)
    _verify_shapes(model_dir, output_dir)


def _verify_shapes(model_dir: Path, output_dir: Path) -> None:
    """Raise DataError if the written tensors differ in name, shape or dtype from the model's.

    Other programs have saved fully trained embeddings as empty tensors.
    """
    before, after = (weights.describe_tensors(folder) for folder in (model_dir, output_dir))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise DataError(
                f"{output_dir}: {name} was written as {after.get(name)}, expected "
                f"{before.get(name)}"
            )


@torch.inference_mode()
def verify_logits(model_dir: Path, output_dir: Path) -> float:
    """Return the largest difference between logits of the merged model and of model plus adapter.

    Computed in float32, relative to the largest logit. Raises DataError if it is larger than
    rounding the weights to the stored dtype explains.
    """

    def compute_logits(folder: Path, adapter: Path | None) -> torch.Tensor:
        model: Any = weights.load_glm(folder, GlmForCausalLM, torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        ids = torch.linspace(0, model.config.vocab_size - 1, VERIFIED_IDS).long()
        return model.eval()(ids[None]).logits

    expected = compute_logits(model_dir, output_dir / ADAPTER)
    actual = compute_logits(output_dir, None)
    difference = ((expected - actual).abs().max() / expected.abs().max()).item()
    dtypes = {dtype for dtype, _ in weights.describe_tensors(output_dir).values()}
    eps = max(torch.finfo(weights.DTYPES[dtype]).eps for dtype in dtypes)
    allowed = max(8 * eps, ROUNDING)
    if not difference <= allowed:
        raise DataError(
            f"{output_dir}: logits of the merged model differ from those of model plus adapter by "
            f"{difference:.1e} of the largest, expected at most {allowed:.1e}"
        )
    return difference
