"""Loading a model for training, and merging an adapter: exact if it fits, refused if not."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GlmForCausalLM

from chatglm_ja.bases import families
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.storage import files, weights
from chatglm_ja.training import adapter
from chatglm_ja.training.adapter import (
    ADAPTER,
    PEFT_PREFIX,
    load_for_training,
    save_adapter,
    verify_logits,
    write_merged,
)
from tests import tiny_models
from tests.training.runs import config_for

KINDS = sorted(tiny_models.SIZES)
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
        is_frozen = not parameter.requires_grad
        assert path.startswith(f"{resized_dir}/") == is_frozen, name


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_weights_are_converted_on_the_device(
    resized_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """On the host, every process would need memory for a converted copy."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    loaded: list[tuple[torch.device, torch.dtype]] = []
    load = adapter.load_model

    def load_noted(*given: Any, **named: Any) -> Any:
        model = load(*given, **named)
        loaded.extend((p.device, p.dtype) for p in model.parameters())
        return model

    monkeypatch.setattr(adapter, "load_model", load_noted)
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
    records = write_merged(resized_dir, adapted)
    assert records == {p.name: files.record_file(p) for p in adapted.glob("model-*.safetensors")}
    trained = load_file(adapted / ADAPTER / "adapter_model.safetensors")
    before, after = (dict(weights.iterate_tensors(f)) for f in (resized_dir, adapted))
    assert before.keys() == after.keys()
    for name, old in before.items():
        module = PEFT_PREFIX + name.removesuffix(".weight")
        expected = old
        if PEFT_PREFIX + name in trained:
            expected = trained[PEFT_PREFIX + name].to(old.dtype)
        elif f"{module}.lora_A.weight" in trained:
            up, down = (trained[f"{module}.lora_{x}.weight"].double() for x in "BA")
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
    families.copy_tokenizer(resized_dir, single)
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


def train_steps(model: Any, steps: int = 3) -> list[float]:
    """Train on random rows with AdamW; return the losses."""
    ids = torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rows", ["all", "new"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_architecture_is_trained_saved_and_merged(
    tmp_path: Path, kind: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied or not, transposed or not: plain PEFT and the merged model compute what was trained, and
    what was not trained is stored as before."""
    first = 300
    monkeypatch.setattr(
        adapter.families, "load_tokenizer", lambda _: SimpleNamespace(first_new_id=first)
    )
    folder = tiny_models.make_tiny(kind, tmp_path / "model")
    config = config_for(folder, folder, tmp_path, embedding_rows=rows)
    torch.manual_seed(0)
    model: Any = load_for_training(config, torch.float32)
    before = dict(weights.iterate_tensors(folder))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    embeddings = [name for name in trained if "lora_" not in name]
    assert len(embeddings) == (1 if AutoConfig.from_pretrained(folder).tie_word_embeddings else 2)
    assert all(len(trained[name]) == (320 if rows == "all" else 20) for name in embeddings)
    losses = train_steps(model)
    assert losses[-1] < losses[0] - 0.05
    ids = torch.randint(3, 320, (2, 30))
    with torch.inference_mode():
        expected = model.eval()(input_ids=ids).logits
    save_adapter(config, model, {name: p.detach() for name, p in trained.items()},
                 tmp_path / ADAPTER)  # fmt: skip
    stored = load_file(tmp_path / ADAPTER / "adapter_model.safetensors")
    assert sum("lora_" not in name for name in stored) == len(embeddings)
    write_merged(folder, tmp_path)
    assert verify_logits(folder, tmp_path) < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path / ADAPTER)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        for other in (adapted, merged):
            assert torch.allclose(other.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    after = dict(weights.iterate_tensors(tmp_path))
    assert after.keys() == before.keys()
    for name in before:
        if name == next(iter(embeddings)).removeprefix(PEFT_PREFIX).replace(".new", ".weight"):
            assert not torch.equal(before[name][first:], after[name][first:])
            assert torch.equal(before[name][:first], after[name][:first]) == (rows == "new")
        elif "norm" in name or "bias" in name or ".ln_" in name or "wpe" in name:
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_lora_adapts_every_linear_layer_of_the_transformer(tmp_path: Path, kind: str) -> None:
    folder = tiny_models.make_tiny(kind, tmp_path / "model")
    config = config_for(folder, folder, tmp_path)
    model: Any = load_for_training(config, torch.float32)
    adapted = {
        name.removeprefix(PEFT_PREFIX).partition(".lora_A")[0]
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    matrices = {
        name.removesuffix(".weight")
        for name, tensor in weights.iterate_tensors(folder)
        if tensor.dim() == 2 and tensor.shape[0] != 320 and "wpe" not in name
    }
    assert adapted == matrices
    assert len(adapted) == 2 * {"llama": 7, "qwen3": 7, "glm": 6, "gpt2": 4}[kind]


def test_transposed_matrices_are_marked_for_peft(tmp_path: Path) -> None:
    folder = tiny_models.make_tiny("gpt2", tmp_path / "model")
    config = config_for(folder, folder, tmp_path)
    model: Any = load_for_training(config, torch.float32)
    save_adapter(config, model, {}, tmp_path / ADAPTER)
    settings = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is True
    assert sorted(settings["target_modules"]) == ["c_attn", "c_fc", "c_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_embeddings_are_neither_trained_nor_saved(tmp_path: Path, kind: str) -> None:
    folder = tiny_models.make_tiny(kind, tmp_path / "model")
    config = config_for(folder, folder, tmp_path, train_embeddings=False)
    model: Any = load_for_training(config, torch.float32)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    save_adapter(config, model, {}, tmp_path / ADAPTER)
    stored = load_file(tmp_path / ADAPTER / "adapter_model.safetensors")
    assert all("lora_" in name for name in stored)


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_of_any_architecture_is_compiled(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatglm_ja.training.settings._find_compiler_problems", lambda *_: [])
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compiled.append(type(m).__name__))
    folder = tiny_models.make_tiny(kind, tmp_path / "model")
    load_for_training(config_for(folder, folder, tmp_path, compile=True), torch.float32)
    layer = {"llama": "LlamaDecoderLayer", "qwen3": "Qwen3DecoderLayer", "glm": "GlmDecoderLayer"}
    assert compiled == [layer.get(kind, "GPT2Block")] * 2


@pytest.mark.parametrize("changes", [{"lora_targets": ("query",)}, {"lora_targets": ("lm_head",)}])
def test_targets_that_the_layers_do_not_have_are_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tiny_models.make_tiny("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"names \w+: the layers of this model have q_proj, "):
        load_for_training(config_for(folder, folder, tmp_path, **changes), torch.float32)
