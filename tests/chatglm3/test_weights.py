"""Conversion and resizing against what ChatGLM3's own code computed from the same files."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatglm_ja.bases.families import open_base_model
from chatglm_ja.chatglm3 import tensor_names, weights
from chatglm_ja.errors import ArtifactError, DataError
from chatglm_ja.storage.weight_files import INDEX_FILE

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
    state = dict(base.glm_tensors())
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == tensor_names.glm_shapes(base.config)
    for name in tensor_names.expected_shapes(base.config):
        back = tensor_names.to_chatglm(name, state.__getitem__)
        assert torch.equal(back, base.tensor(name))


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
        (lambda folder: break_config(folder, quantization_config={"bits": 4}), "quantized"),
        (lambda folder: break_config(folder, rope_ratio=500), "GLM-4"),
        (lambda folder: break_config(folder, _name_or_path="THUDM/chatglm2-6b"), "ChatGLM2"),
        (lambda folder: (folder / INDEX_FILE).unlink(), "it lacks the index of its shards"),
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


# --- folders made of links ----------------------------------------------------------------------


def link_all(base: Path, folder: Path) -> None:
    """Link every file, through a second link and by a relative path."""
    folder.mkdir()
    (folder.parent / "disk").symlink_to(base)
    for path in base.iterdir():
        (folder / path.name).symlink_to(f"../disk/{path.name}")


def link_to_blobs(base: Path, folder: Path) -> None:
    """Link the shards alone to files of other names, as the hub's cache does."""
    shutil.copytree(base, folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(sorted(folder.glob("model-*.safetensors"))):
        shard.rename(blobs / str(number))
        shard.symlink_to(blobs / str(number))


@pytest.mark.parametrize(
    "make", [link_all, link_to_blobs, lambda base, folder: folder.symlink_to(base)]
)
def test_a_base_may_be_made_of_links(
    make: Callable[[Path, Path], None], base_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    make(base_dir, folder)
    assert [item.fingerprint for item in open_base_model(folder)] == [
        item.fingerprint for item in open_base_model(base_dir)
    ]
    new, old = weights.BaseWeights(folder), weights.BaseWeights(base_dir)
    assert torch.equal(new.tensor(tensor_names.EMBEDDING), old.tensor(tensor_names.EMBEDDING))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", SHARD])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere_is_named(
    name: str, target: str, base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    (folder / name).unlink()
    (folder / name).symlink_to(name if target == "itself" else target)
    with pytest.raises(ArtifactError, match=f"{name} is a link to .*, which does not exist"):
        open_base_model(folder)


@pytest.mark.parametrize("name", [f"../other/{SHARD}", f"/tmp/{SHARD}", f"x/../{SHARD}"])
def test_an_index_names_no_path_outside_its_folder(
    name: str, base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    index = (folder / INDEX_FILE).read_text()
    (folder / INDEX_FILE).write_text(index.replace(SHARD, name))
    with pytest.raises(ArtifactError, match="lies outside of it"):
        weights.BaseWeights(folder)


# --- mixed dtypes -------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    for path in folder.glob("model-*.safetensors"):
        save_file({name: change(name, t) for name, t in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("is_other", "other", "expected"),
    [
        (lambda name: "layernorm" in name, torch.float32, torch.float16),
        (lambda name: "embedding" in name, torch.bfloat16, torch.float16),
        # Most tensors, but few weights.
        (lambda name: "dense_" not in name and "embed" not in name, torch.float32, torch.float16),
        (lambda name: "layernorm" not in name, torch.float32, torch.float32),
    ],
)
def test_mixed_dtypes_are_cast_to_that_of_most_weights(
    is_other: Callable[[str], bool], other: torch.dtype, expected: torch.dtype,
    base_dir: Path, tmp_path: Path, copy_of: Copy, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = copy_of(base_dir, tmp_path / "base")
    rewrite(folder, lambda name, t: t.to(other) if is_other(name) else t)
    mixed = weights.BaseWeights(folder)
    stored = {name: tensor for path in folder.glob("model-*.safetensors")
              for name, tensor in load_file(path).items()
              if name not in tensor_names.IGNORED}  # fmt: skip
    assert {tensor.dtype for tensor in stored.values()} == {other, torch.float16}
    read = dict(mixed.tensors())
    assert mixed.dtype == expected
    assert mixed.size() == sum(tensor.nbytes for tensor in read.values())
    for name, tensor in read.items():
        assert tensor.dtype == expected
        assert torch.equal(tensor, stored[name].to(expected))
    assert len(caplog.messages) == 1
    assert re.search(r"holds [\d,]+ weights in \w+: they are cast to F", caplog.text)


def test_a_cast_that_would_overflow_is_refused(
    base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    rewrite(folder, lambda name, t: t.float() + 1e6 if name == tensor_names.FINAL_NORM else t)
    base = weights.BaseWeights(folder)
    with pytest.raises(DataError, match=r"final_layernorm.weight is torch.float32, with values"):
        list(base.tensors())


# --- what other tools leave -----------------------------------------------------------------------

WRAPPED = "saved with a wrapper around the model"
LAYER = "transformer.encoder.layers.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"transformer.prefix_encoder.embedding.weight": torch.zeros(2)}, "P-Tuning"),
        (lambda s: {"transformer.prefix_encoder.embedding.weight": torch.zeros(2)}, "P-Tuning"),
        (lambda s: {f"module.{n}": t for n, t in s.items()}, WRAPPED),
        (lambda s: {f"_orig_mod.{n}": t for n, t in s.items()}, WRAPPED),
        (lambda s: {f"_fsdp_wrapped_module.{n}": t for n, t in s.items()}, WRAPPED),
        (lambda s: {f"base_model.model.{n}": t for n, t in s.items()}, WRAPPED),
        (lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()}, WRAPPED),
        (lambda s: {n.replace("encoder.", "encoder._orig_mod."): t for n, t in s.items()}, WRAPPED),
        (lambda s: s | {f"{LAYER}.mlp.dense_h_to_4h.lora_A.default.weight": torch.zeros(2)},
         "adapter"),
        (lambda s: {n.replace("dense.", "dense.base_layer."): t for n, t in s.items()}, "adapter"),
        (lambda s: {f"base_model.model.{LAYER}.self_attention.dense.lora_B.weight": torch.ones(1)},
         "adapter"),
        (lambda s: s | {"lm_head.weight": torch.zeros(2)}, "some tools add such a head"),
        (lambda s: s | {"v_head.summary.weight": torch.zeros(2)}, "some tools add such a head"),
        (lambda s: {"lm_head.weight": torch.ones(2), "model.norm.weight": torch.ones(2)},
         "another layout"),
        (lambda s: s | {f"{LAYER}.mlp.dense_h_to_4h.weight_scale": torch.zeros(2)}, "quantized"),
        (lambda s: s | {f"{LAYER}.mlp.dense_h_to_4h.qweight": torch.zeros(2)}, "quantized"),
        (lambda s: s | {f"{LAYER}.mlp.dense_h_to_4h.SCB": torch.zeros(2)}, "quantized"),
        (lambda s: {n: t.to(torch.int8) if "mlp" in n else t for n, t in s.items()},
         "is of dtype I8, expected one of F16, BF16, F32: it is quantized"),
        (lambda s: {n: torch.zeros(0) if "mlp" in n else t for n, t in s.items()},
         r"has shape \(0,\), but .*: ZeRO-3 saves tensors empty"),
        (lambda s: s | {"something.else": torch.zeros(2)}, "else: its config.json describes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_other_tools_are_called_what_they_are(
    file: str, change: Callable[[Any], Any], message: str, base_dir: Path, tmp_path: Path
) -> None:
    state: dict[str, torch.Tensor] = {}
    for path in base_dir.glob("model-*.safetensors"):
        state |= load_file(path)
    shutil.copy(base_dir / "config.json", tmp_path)
    if file.endswith(".bin"):
        torch.save(change(state), tmp_path / file)
        message = message.replace("dtype I8", "dtype torch.int8")
    else:
        save_file(change(state), tmp_path / file)
    with pytest.raises(DataError, match=message):
        weights.BaseWeights(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "it is an adapter"),
        ("adapter_config.json", "it is an adapter"),
        ("global_step500/", "it is a DeepSpeed checkpoint"),
        ("mp_rank_00_model_states.pt", "it is a DeepSpeed checkpoint"),
        ("__0_0.distcp", "it is a sharded FSDP checkpoint"),
        ("snapshots/", "it is the hub's cache"),
        ("chatglm3-6b-q4.gguf", "it is quantized"),
        ("model-00001-of-00007.safetensors.incomplete", "its download has not finished"),
        ("model-00001-of-00007.safetensors", "it lacks the index of its shards"),
    ],
)
def test_folders_of_other_tools_are_called_what_they_are(
    name: str, message: str, base_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.touch()
    shutil.copy(base_dir / "tokenizer.model", tmp_path)
    with pytest.raises(ArtifactError, match=f"has no config.json, but {path.name}: {message}"):
        open_base_model(tmp_path)
    shutil.copy(base_dir / "config.json", tmp_path)
    with pytest.raises(DataError, match=f"holds none of .*, but {path.name}: {message}"):
        weights.BaseWeights(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", SHARD])
def test_a_pointer_of_git_lfs_is_called_one(
    name: str, base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ArtifactError, match=f"{name} is a Git LFS pointer.*`git lfs pull` in"):
        open_base_model(folder)


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
    shard = as_bin(folder)[0]
    torch.save([torch.ones(2)], shard)
    with pytest.raises(DataError, match="is not a dictionary of tensors: expected"):
        weights.BaseWeights(folder)
    torch.save({"model": {"x": torch.ones(2)}, "step": 5}, shard)
    with pytest.raises(DataError, match="is not a dictionary of tensors, but of 'model', 'step'"):
        weights.BaseWeights(folder)
