"""What a run trains, as an adapter: built, saved, and merged into the model.

    part         training                 merging
    LoRA         --lora-targets           W + (alpha / rank) B A, in float32, rounded once to the
                                          model's stored dtype
    embeddings   in full, or new rows     the trained matrices replace the stored ones
    the rest     frozen                   copied

`load_for_training` builds the model; `save_adapter` writes what was trained in PEFT's format. The
two embedding matrices are trained in place: PEFT's `modules_to_save` would keep a frozen second
copy of both. `write_merged` holds the adapter and one shard of the result in memory, whatever the
size of the model. The result has the model's names, shapes and dtypes, which is checked on the
written files. Tied embeddings are one matrix, trained, stored and merged once.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tqdm.auto import tqdm

from chatglm_ja.bases import families, loading
from chatglm_ja.bases.loading import compute_dtype, load_model
from chatglm_ja.bases.modules import find_embeddings, find_layers, has_transposed_weights
from chatglm_ja.bases.shape import read_shape
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.storage import weights
from chatglm_ja.storage.files import FileRecord, read_json
from chatglm_ja.training.model import TrainingLoss, join_embeddings, split_embeddings
from chatglm_ja.training.recomputation import recompute_activations
from chatglm_ja.training.settings import TrainingConfig

log = logging.getLogger(__name__)

ADAPTER = "adapter"
MAX_SHARD_BYTES = 2 * 10**9
# An adapter's tensors have the names of the model's with this prefix.
PEFT_PREFIX = "base_model.model."
VERIFIED_IDS = 64  # input of `verify_logits`: ids spread over the whole vocabulary
# Allowed difference of logits, relative to the largest, for another order of sums in float32, also
# in deep models. A wrong merge differs by far more.
ROUNDING = 1e-3


def choose_dtype(config: TrainingConfig) -> torch.dtype:
    """Return the dtype of the frozen weights and of the computation."""
    if config.precision == "auto":
        return compute_dtype()
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]


def load_for_training(
    config: TrainingConfig, dtype: torch.dtype, device: torch.device = loading.CPU
) -> PeftModel:
    """Load the model on `device` with LoRA matrices, and with trainable embeddings if the settings
    say so.

    Trained weights are float32 (DeepSpeed makes them half precision, with float32 masters); frozen
    ones have `dtype`.
    """
    log.info("loading %s", config.model)
    model: Any = load_model(config.model, "auto", device, TrainingLoss)
    # Converted on the device: on the host every process would need memory for its own copy.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if device.type != "meta":  # where there are no numbers to compare
        loading.check_training(model, config.model)
    if config.embedding_rows == "new":
        split_embeddings(model, families.load_tokenizer(config.model).first_new_id)
    shape = read_shape(config.model)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(dict.fromkeys(x.name for x in shape.find_linears(config.lora_targets))),
        fan_in_fan_out=has_transposed_weights(model),
    )
    embeddings = trained_embeddings(model)
    model = get_peft_model(model, lora)  # freezes everything but LoRA's matrices
    if config.learning_rate == 0:
        model.requires_grad_(False)
    for parameter in embeddings.values():
        parameter.requires_grad_(config.train_embeddings)
    for name, rows in read_embeddings(config.model, model):
        model.get_parameter(name).data = rows
    for module in model.modules():
        # Otherwise LoRA layers copy their inputs to float32, and autocast converts them back.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    layers = find_layers(model.get_base_model())
    recompute_activations(layers, shape, config.gradient_checkpointing)
    if config.compile:
        # Layer by layer: all layers are alike, so they share one compilation.
        for layer in layers:
            layer.compile()
    return model


def trained_embeddings(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters of a model's embeddings, by their names in the model.

    They are whole matrices, or their new rows; one of tied matrices, otherwise two, input first.
    """
    return {
        f"{name}.{part}": parameter
        for name, module in find_embeddings(model).items()
        for part, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def read_embeddings(folder: Path, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the stored values of the embeddings that `model` trains, in float32, by parameter name.

    They are on the model's device. Those in a loaded model are rounded to the dtype of the
    computation.
    """
    for name, parameter in trained_embeddings(model.get_base_model()).items():
        stored = weights.read_tensor(folder, name.rpartition(".")[0] + ".weight")
        yield PEFT_PREFIX + name, stored[-len(parameter) :].to(parameter.device).float()


def save_adapter(
    config: TrainingConfig, model: Any, trained: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write the `trained` weights, float32 by parameter name, to `folder` in PEFT's format.

    They replace those in `model`, which DeepSpeed rounds to half precision.
    """
    for name, value in trained.items():
        model.get_parameter(name).data = value
    if config.embedding_rows == "new":
        base = model.get_base_model()
        names = [f"{name}.weight" for name in find_embeddings(base)]
        join_embeddings(base, [weights.read_tensor(config.model, name) for name in names])
    # Only the folder's name: its path on this machine means nothing elsewhere.
    model.peft_config["default"].base_model_name_or_path = config.model.resolve().name
    # Each parameter once: tied embeddings have two names.
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=config.train_embeddings)
    (folder / "README.md").unlink()  # PEFT's template of a model card, not filled in


def write_merged(model_dir: Path, output_dir: Path) -> dict[str, FileRecord]:
    """Merge `output_dir`/adapter into the model of `model_dir` and write it to `output_dir`.

    The adapter is read back from disk, so that what was saved is what is merged. The result keeps
    the model's stored dtype and loads with plain `AutoModelForCausalLM` and `AutoTokenizer`.
    Returns the records of the shards. Raises DataError if adapter and model do not fit, and if a
    tensor was written with another shape or dtype.
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
                if settings["fan_in_fan_out"]:  # weights are stored [inputs, outputs]
                    update = update.T
                tensor = (tensor.float() + update).to(tensor.dtype)
            yield name, tensor

    tensors = tqdm(merge(), desc="merging", unit=" tensors")
    records = weights.write_sharded(tensors, output_dir, MAX_SHARD_BYTES)
    if adapter:
        raise DataError(f"{folder} holds {min(adapter)}, which {model_dir} has no place for")
    for name in ("config.json", "generation_config.json"):
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, output_dir / name)
    families.copy_tokenizer(model_dir, output_dir)
    # Other programs have saved fully trained embeddings as empty tensors.
    before, after = (weights.describe_tensors(folder) for folder in (model_dir, output_dir))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise DataError(
                f"{output_dir}: {name} was written as {after.get(name)}, expected "
                f"{before.get(name)}"
            )
    return records


@torch.inference_mode()
def verify_logits(model_dir: Path, output_dir: Path) -> float:
    """Return the largest difference between logits of the merged model and of model plus adapter.

    Computed in float32, relative to the largest logit. Raises DataError if it is larger than
    rounding the weights to the stored dtype explains.
    """

    def compute_logits(folder: Path, adapter: Path | None) -> torch.Tensor:
        model: Any = load_model(folder, torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        rows = len(model.get_input_embeddings().weight)
        ids = torch.linspace(0, rows - 1, VERIFIED_IDS).long()
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
