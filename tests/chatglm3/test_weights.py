"""Conversion and resizing against what ChatGLM3's own code computed from the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatglm_ja.chatglm3 import tensor_names, weights
from chatglm_ja.chatglm3.base_config import INDEX_FILE
from chatglm_ja.errors import DataError

Copy = Callable[[Path, Path], Path]
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def expected(base_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(base_dir / "expected.safetensors")


def check_parity(model: Any, expected: dict[str, torch.Tensor], old_ids: int) -> None:
    """Compare the last logits within 1e-5, and the greedy tokens, over the ids of both models."""
    for index in range(3):
        prompt, greedy = expected[f"ids_{index}"], expected[f"greedy_{index}"]
        length = prompt.shape[1]
        assert torch.equal(greedy[:, :length], prompt)
        with torch.inference_mode():
            logits = model(greedy).logits[0, :, :old_ids]
        reference = expected[f"logits_last_{index}"][:old_ids]
        assert torch.allclose(logits[length - 1], reference, rtol=0, atol=1e-5)
        best = logits[length - 1 : -1].argmax(dim=-1)
        wanted = greedy[0, length:]
        # One prompt generates a padding row of the base, which is not among the old ids; compare
        # only the tokens before it.
        count = int((wanted < old_ids).long().cumprod(dim=0).sum())
        assert count >= 9
        assert torch.equal(best[:count], wanted[:count])


def test_the_converted_base_computes_what_chatglm3_computes(
    base_dir: Path, expected: dict[str, torch.Tensor]
) -> None:
    model = weights.load_base(weights.BaseWeights(base_dir), torch.float32)
    check_parity(model, expected, 4096)
    for index in range(3):
        with torch.inference_mode():
            logits = model(expected[f"ids_{index}"]).logits[0]
        means = expected[f"logits_mean_{index}"].flatten()
        assert torch.allclose(logits.mean(dim=-1), means, rtol=0, atol=1e-5)


def test_the_resized_model_computes_the_same_over_the_old_ids(
    base_dir: Path, resized_dir: Path, expected: dict[str, torch.Tensor]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    check_parity(model, expected, 4009)
    base = weights.load_base(weights.BaseWeights(base_dir), torch.float32)
    ids = expected["greedy_2"]
    with torch.inference_mode():
        before, after = base(ids).logits[..., :4009], model(ids).logits[..., :4009]
    assert torch.equal(before, after)


def test_names_and_shapes_survive_the_round_trip(base_dir: Path) -> None:
    base = weights.BaseWeights(base_dir)
    back = tensor_names.to_chatglm(dict(base.glm_tensors()))
    assert back.keys() == tensor_names.expected_shapes(base.config).keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, base.tensor(name))


def break_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    path.write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def reshape(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    name = "transformer.encoder.layers.1.self_attention.dense.weight"
    tensors[name] = tensors[name][:10].contiguous()
    save_file(tensors, folder / SHARD)


def change_dtype(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, folder / SHARD)


def lose_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"]["transformer.output_layer.weight"]
    (folder / INDEX_FILE).write_text(json.dumps(index))


def promise_a_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["transformer.encoder.final_layernorm.weight"] = SHARD
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or damaged"),
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} not found"),
        (reshape, r"dense.weight has shape \(10, 64\), but config.json gives \(64, 64\)"),
        (change_dtype, "F64"),
        (lose_tensor, "has no tensor transformer.output_layer.weight"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: break_config(folder, num_layers=None), "lacks num_layers"),
        (lambda folder: break_config(folder, num_layers=2), "has a tensor .*layers.2"),
        (lambda folder: break_config(folder, model_type="llama"), "model_type is 'llama'"),
        (lambda folder: break_config(folder, rope_ratio=50), "rope_ratio is 50"),
        (lambda folder: break_config(folder, quantization_bit=4), "quantized"),
        (lambda folder: break_config(folder, rope_ratio=500), "GLM-4"),
        (lambda folder: break_config(folder, _name_or_path="THUDM/chatglm2-6b"), "ChatGLM2"),
        (lambda folder: (folder / INDEX_FILE).unlink(), "expected ChatGLM3's weights"),
        (promise_a_tensor, f"{SHARD} lacks transformer.encoder.final_layernorm.weight"),
    ],
)
def test_a_broken_checkpoint_is_refused_with_its_problem(
    damage: Callable[[Path], None], message: str, base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    damage(folder)
    with pytest.raises(DataError, match=message):
        weights.BaseWeights(folder)


# --- pytorch_model-*.bin -------------------------------------------------------------------------


def as_bin(folder: Path) -> list[Path]:
    """Turn the safetensors shards of a folder into .bin shards, inv_freq among them."""
    index = json.loads((folder / INDEX_FILE).read_text())
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors = load_file(path)
        if path.name == SHARD:
            tensors[tensor_names.IGNORED[0]] = torch.ones(8)
        torch.save(tensors, folder / f"pytorch_{path.stem}.bin")
        path.unlink()
    weight_map = {
        name: f"pytorch_{Path(file).stem}.bin" for name, file in index["weight_map"].items()
    }
    weight_map[tensor_names.IGNORED[0]] = f"pytorch_{Path(SHARD).stem}.bin"
    text = json.dumps({"weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    (folder / INDEX_FILE).unlink()
    return sorted(folder.glob("*.bin"))


def test_bin_shards_are_the_same_checkpoint(base_dir: Path, tmp_path: Path, copy_of: Copy) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    as_bin(folder)
    old, new = weights.BaseWeights(base_dir), weights.BaseWeights(folder)
    assert new.dtype == old.dtype == torch.float16
    tensors = dict(new.glm_tensors())
    assert tensors.keys() == dict(old.glm_tensors()).keys()
    for name, tensor in old.glm_tensors():
        assert torch.equal(tensors[name], tensor)


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_a_pickle_with_code_is_refused_without_running_it(
    base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    shard = as_bin(folder)[1]
    tensors = torch.load(shard, weights_only=True)
    torch.save({**tensors, "bomb": Bomb(tmp_path / "trace")}, shard)
    with pytest.raises(DataError, match=f"{shard.name} holds more than tensors, and code in it"):
        weights.BaseWeights(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_bin_is_refused(
    size: int, base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    shard = as_bin(folder)[0]
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(
        DataError, match=f"{shard.name} is truncated, damaged or too old|not a dictionary"
    ):
        weights.BaseWeights(folder)


def test_a_bin_that_is_not_a_dictionary_is_refused(
    base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    torch.save([torch.ones(2)], as_bin(folder)[0])
    with pytest.raises(DataError, match="is not a dictionary of tensors"):
        weights.BaseWeights(folder)
