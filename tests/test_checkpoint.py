"""Conversion and resizing against what ChatGLM3's own code computed from the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm_ja import checkpoint, resize, tokenizer
from chatglm_ja.errors import DataError

Copy = Callable[[Path, Path], Path]
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def expected(base_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(base_dir / "expected.safetensors")


def check_parity(model: Any, expected: dict[str, torch.Tensor], old_ids: int) -> None:
    """Last logits within 1e-5, and the greedy tokens, over the ids that both models have."""
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
        # A padding row of the base, which one prompt generates, is not among the old ids: what
        # follows it had another context.
        kept = int((wanted < old_ids).long().cumprod(dim=0).sum())
        assert kept >= 9
        assert torch.equal(best[:kept], wanted[:kept])


def test_the_converted_base_computes_what_chatglm3_computes(
    base_dir: Path, expected: dict[str, torch.Tensor]
) -> None:
    model = checkpoint.load_base(base_dir, torch.float32)
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
    base = checkpoint.load_base(base_dir, torch.float32)
    ids = expected["greedy_2"]
    with torch.inference_mode():
        before, after = base(ids).logits[..., :4009], model(ids).logits[..., :4009]
    assert torch.equal(before, after)


def test_names_and_shapes_survive_the_round_trip(base_dir: Path) -> None:
    base = checkpoint.Checkpoint(base_dir)
    back = checkpoint.chatglm_tensors(dict(base.glm_tensors()))
    assert back.keys() == checkpoint.expected_shapes(base.config).keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, base.tensor(name))


def test_the_resized_folder_is_complete(resized_dir: Path, merge: Any) -> None:
    rows = resize.padded_rows(len(merge.proto.pieces), 64)
    model = AutoModelForCausalLM.from_pretrained(resized_dir)
    assert model.dtype == torch.float16
    assert model.get_input_embeddings().weight.shape == (rows, 64)
    assert model.get_output_embeddings().weight.shape == (rows, 64)
    assert len(list(resized_dir.glob("model-*.safetensors"))) > 2
    assert len(AutoTokenizer.from_pretrained(resized_dir)) == len(merge.proto.pieces)
    stops = [2, 4000 + 6, 4000 + 8]
    assert model.generation_config.eos_token_id == stops
    padding = list(range(len(merge.proto.pieces), rows))
    assert (model.generation_config.suppress_tokens or []) == padding


def test_new_rows_are_the_means_of_their_subtokens(
    base_dir: Path, resized_dir: Path, base_proto: Any, merge: Any
) -> None:
    """Computed again from the base tokenizer itself: its ids after the dummy prefix."""
    old = load_file(base_dir / "model-00001-of-00003.safetensors")[checkpoint.EMBEDDING]
    new = checkpoint.read_tensor(resized_dir, checkpoint.GLM_EMBEDDING)
    base = tokenizer.processor(base_proto)
    mark = base.encode("\n")[0]
    for offset, piece in enumerate(merge.added[:200]):
        # After a line break, which no merge crosses, the text is encoded as inside a document.
        ids = base.encode("\n" + piece.replace("▁", " "))
        assert ids[0] == mark
        mean = old[ids[2:]].double().mean(dim=0)
        assert torch.allclose(new[4009 + offset].double(), mean, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("init", ["subtoken_mean", "mean", "random"])
def test_resize_keeps_every_bit_of_the_old_rows(init: resize.Init) -> None:
    weight = torch.randn(12, 8).half()
    weight[3, 3] = torch.tensor(float("nan"))
    weight[4, 4] = -0.0
    generator = torch.Generator().manual_seed(0)
    resized = resize.resize_rows(weight, 10, [[1, 2], [5]], 16, init, generator)
    assert torch.equal(resized[:10].view(torch.int16), weight[:10].view(torch.int16))
    assert resized.dtype == weight.dtype
    assert not resized[12:].any()
    if init == "subtoken_mean":
        assert torch.equal(resized[10], ((weight[1].float() + weight[2].float()) / 2).half())
        assert torch.equal(resized[11], weight[5])


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
    index = json.loads((folder / checkpoint.INDEX_FILE).read_text())
    del index["weight_map"]["transformer.output_layer.weight"]
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps(index))


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
        (lambda folder: break_config(folder, quantization_bit=4), "quantised"),
        (lambda folder: (folder / checkpoint.INDEX_FILE).unlink(), "expected ChatGLM3's weights"),
    ],
)
def test_a_broken_checkpoint_is_named(
    damage: Callable[[Path], None], message: str, base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    folder = copy_of(base_dir, tmp_path / "base")
    damage(folder)
    with pytest.raises(DataError, match=message):
        checkpoint.Checkpoint(folder)
