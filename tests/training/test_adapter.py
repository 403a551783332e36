"""Loading a model for training, and merging an adapter: exact if it fits, refused if not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GlmForCausalLM

from chatglm_ja.chatglm3 import tokenizer_files
from chatglm_ja.errors import DataError
from chatglm_ja.storage import weights
from chatglm_ja.training.adapter import (
    ADAPTER,
    EMBEDDINGS,
    PEFT_PREFIX,
    load_for_training,
    verify_logits,
    write_merged,
)
from chatglm_ja.training.model import GlmForTraining
from tests.training.runs import config_for

EMBEDDING = "base_model.model.model.embed_tokens.weight"


def mapped_files() -> dict[range, str]:
    """The files that are mapped into this process's memory, by their addresses."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith("/"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found[range(start, end)] = path
    return found


def test_frozen_weights_are_not_copied_from_their_files(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """All processes of a machine share the memory of mapped files."""
    config = config_for(resized_dir, data_dir, tmp_path)
    model = load_for_training(config, torch.float16)  # as it is stored
    files = mapped_files()
    for name, parameter in model.named_parameters():
        path = next((path for at, path in files.items() if parameter.data_ptr() in at), "")
        is_frozen = "lora_" not in name and not name.endswith(EMBEDDINGS)
        assert path.startswith(f"{resized_dir}/") == is_frozen, name


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_weights_are_converted_on_the_device(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """On the host, every process would need memory for a converted copy."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    loaded: list[tuple[torch.device, torch.dtype]] = []
    load = GlmForTraining.from_pretrained

    def load_noted(*given: Any, **named: Any) -> Any:
        model = load(*given, **named)
        loaded.extend((p.device, p.dtype) for p in model.parameters())
        return model

    monkeypatch.setattr(GlmForTraining, "from_pretrained", load_noted)
    config = config_for(resized_dir, data_dir, tmp_path)
    model = load_for_training(config, torch.bfloat16, torch.device(device))
    assert {(where.type, dtype) for where, dtype in loaded} == {(device, torch.float16)}
    trained = {True: torch.float32, False: torch.bfloat16}
    for parameter in model.parameters():
        assert parameter.device.type == device
        assert parameter.dtype == trained[parameter.requires_grad]


@pytest.fixture
def adapted(resized_dir: Path, tmp_path: Path) -> Path:
    """A folder with an adapter of random matrices and random embeddings."""
    torch.manual_seed(0)
    base = GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    )
    model = get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith("embed_tokens.weight"):
            parameter.data = torch.randn_like(parameter) * 0.02
    model.save_pretrained(str(tmp_path / ADAPTER), save_embedding_layers=True)
    return tmp_path


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    path = folder / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, path)


def test_what_is_not_trained_is_copied_and_the_rest_computed(
    adapted: Path, resized_dir: Path
) -> None:
    write_merged(resized_dir, adapted)
    adapter = load_file(adapted / ADAPTER / "adapter_model.safetensors")
    before, after = (dict(weights.iterate_tensors(f)) for f in (resized_dir, adapted))
    assert before.keys() == after.keys()
    for name, old in before.items():
        module = PEFT_PREFIX + name.removesuffix(".weight")
        expected = old
        if PEFT_PREFIX + name in adapter:
            expected = adapter[PEFT_PREFIX + name].to(old.dtype)
        elif f"{module}.lora_A.weight" in adapter:
            up, down = (adapter[f"{module}.lora_{x}.weight"].double() for x in "BA")
            expected = (old.double() + 6 / 4 * up @ down).to(old.dtype)
        assert after[name].dtype == old.dtype
        # The sum is rounded to float32 before it is rounded to what is stored.
        assert torch.allclose(after[name].double(), expected.double(), rtol=1e-3, atol=1e-7), name
    changed = sum(not torch.equal(old, after[name]) for name, old in before.items())
    assert changed == 6 * 3 + 1
    assert 0 < verify_logits(resized_dir, adapted) < 8 * torch.finfo(torch.float16).eps


def test_an_adapter_of_another_shape_is_refused(adapted: Path, resized_dir: Path) -> None:
    """Embeddings that were saved empty, as under ZeRO-3, among them."""
    change(adapted, EMBEDDING, torch.empty(0))
    with pytest.raises(DataError, match=r"embed_tokens\.weight has shape \(0,\), but"):
        write_merged(resized_dir, adapted)


def test_a_tensor_without_a_place_is_refused(adapted: Path, resized_dir: Path) -> None:
    name = PEFT_PREFIX + "model.layers.9.mlp.down_proj.lora_A.weight"
    change(adapted, name, torch.zeros(4, 4))
    with pytest.raises(DataError, match=r"layers\.9\.mlp\.down_proj\.lora_A\.weight, which"):
        write_merged(resized_dir, adapted)


def test_half_a_pair_of_matrices_is_refused(adapted: Path, resized_dir: Path) -> None:
    change(adapted, PEFT_PREFIX + "model.layers.1.mlp.down_proj.lora_B.weight", None)
    with pytest.raises(DataError, match=r"one of the two LoRA matrices of model\.layers\.1\.mlp"):
        write_merged(resized_dir, adapted)


def test_a_model_in_float32_is_merged_and_verified(resized_dir: Path, adapted: Path) -> None:
    """Another order of sums than PEFT's is no error."""
    single = adapted / "single"
    GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32).save_pretrained(single)
    tokenizer_files.copy_tokenizer_files(resized_dir, single)
    assert (single / "model.safetensors").is_file()
    write_merged(single, adapted)
    assert verify_logits(single, adapted) < 1e-4
    assert (adapted / "generation_config.json").read_bytes() == (
        single / "generation_config.json"
    ).read_bytes()


def test_a_merged_model_that_computes_something_else_is_noticed(
    adapted: Path, resized_dir: Path
) -> None:
    write_merged(resized_dir, adapted)
    for path in resized_dir.glob("*.safetensors*"):
        shutil.copyfile(path, adapted / path.name)
    with pytest.raises(DataError, match="logits of the merged model differ"):
        verify_logits(resized_dir, adapted)


def test_a_written_tensor_of_another_dtype_is_noticed(
    adapted: Path, resized_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = weights.iterate_tensors
    monkeypatch.setattr(
        weights, "iterate_tensors", lambda f: ((name, t.float()) for name, t in stored(f))
    )
    with pytest.raises(DataError, match="was written as"):
        write_merged(resized_dir, adapted)
