"""GGUF files: every tensor's bits, the metadata that llama.cpp needs, and what is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import step8_export
from chatglm_ja.errors import ArtifactError, ConfigError, DataError
from chatglm_ja.export import gguf_file, gguf_tokenizer
from chatglm_ja.export.model_folder import ModelFolder
from chatglm_ja.storage import weights
from tests.export.llama_cpp import LlamaTokenizer
from tests.pipeline import Runner, error_of

Copy = Callable[[Path, Path], Path]


def written(model: Path, dtype: str | None, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    made = gguf_file.write_gguf(ModelFolder.open(model), dtype, folder)
    return gguf.GGUFReader(folder / made["file"])


def llama_name(name: str) -> str:
    """Rename a tensor as llama.cpp's own table of GLM's names does."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, 99)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    # Fused gate and up projections have no entry for GLM there.
    return found or name.replace("model.layers", "blk").replace("mlp.gate_up_proj", "ffn_up")


@pytest.mark.parametrize("dtype", [None, "f32", "f16", "bf16", "q8_0"])
def test_every_tensor_is_written(
    dtype: str | None, resized_dir: Path, merged_proto: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gguf_file, "ROWS", 100)  # several parts of a tensor
    reader = written(resized_dir, dtype, tmp_path)
    stored = {llama_name(name): t for name, t in weights.iterate_tensors(resized_dir)}
    assert [tensor.name for tensor in reader.tensors]
    assert {tensor.name for tensor in reader.tensors} == stored.keys()
    for tensor in reader.tensors:
        expected = stored[tensor.name]
        if tensor.name in ("token_embd.weight", "output.weight"):
            assert len(expected) > len(merged_proto.pieces)  # rows without a token
            expected = expected[: len(merged_proto.pieces)]
        assert list(tensor.shape) == list(reversed(expected.shape))
        kind = tensor.tensor_type.name.lower()
        if expected.ndim == 1:
            assert kind == "f32"
        elif dtype == "q8_0":
            assert kind == ("q8_0" if expected.shape[-1] % 32 == 0 else "f16")
        else:
            assert kind == (dtype or "f16")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        exact = expected.to({"bf16": torch.bfloat16}.get(kind, expected.dtype)).float().numpy()
        tolerance = np.abs(exact).max(axis=-1, keepdims=True) / 120 if kind == "q8_0" else 0
        assert (np.abs(values.reshape(exact.shape) - exact) <= tolerance).all()


def test_the_metadata_describe_model_and_tokenizer(
    resized_dir: Path, merged_proto: Any, encoder: Any, tmp_path: Path
) -> None:
    reader = written(resized_dir, None, tmp_path)

    def value(name: str) -> Any:
        return reader.get_field(name).contents()

    assert value("general.architecture") == "chatglm"
    assert value("general.file_type") == gguf.LlamaFileType.MOSTLY_F16
    sizes = {
        "context_length": 256, "embedding_length": 64, "feed_forward_length": 160,
        "block_count": 3, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
    }  # fmt: skip
    assert {name: value(f"chatglm.{name}") for name in sizes} == sizes
    assert value("chatglm.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert value("general.sampling.temp") == pytest.approx(0.8)
    tokenizer = {
        "model": "llama", "add_space_prefix": True, "add_bos_token": False, "add_eos_token": False,
        "remove_extra_whitespaces": False, "bos_token_id": 1, "eos_token_id": 2,
        "eot_token_id": 4006, "eom_token_id": 4008,
    }  # fmt: skip
    assert {name: value(f"tokenizer.ggml.{name}") for name in tokenizer} == tokenizer
    assert value("tokenizer.chat_template") == gguf_tokenizer.write_chat_template(merged_proto)
    llama = LlamaTokenizer.read(reader)
    assert len(llama.names) == len(merged_proto.pieces)
    for text in ("people and philosophy", "表計算ドキュメントを開く。"):
        assert llama.encode(text) == encoder.encode(text)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./model-F16.gguf\n")


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "f16", "values that f16 cannot hold: choose another --dtype"),
        (1e7, "q8_0", "values that q8_0 cannot hold"),
        (float("nan"), None, "holds NaN or infinity"),
        (float("inf"), "q8_0", "holds NaN or infinity"),
    ],
)
def test_a_weight_that_the_dtype_cannot_hold_is_refused(
    resized_dir: Path, tmp_path: Path, copy_of: Copy, value: float, dtype: str, message: str
) -> None:
    model = copy_of(resized_dir, tmp_path / "model")
    for path in model.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][0, 0] = value
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"embed_tokens.weight (has )?{message}"):
        written(model, dtype, tmp_path / "out")


def run_step(monkeypatch: pytest.MonkeyPatch, *flags: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["step8", *map(str, flags)])
    step8_export.main()


def test_a_check_writes_nothing(
    resized_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model", resized_dir, "--output-dir", tmp_path / "out")
    run_step(monkeypatch, *flags, "--check")
    assert not (tmp_path / "out").exists()
    run_step(monkeypatch, *flags)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model-F16.gguf", "Modelfile", "manifest.json", "settings.yaml",
    }  # fmt: skip


def test_without_the_package_the_cure_is_named(
    resized_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the package gguf: run `pip install -r req"):
        run_step(monkeypatch, "--model", resized_dir, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["gguf", "chatglm"])
def test_a_folder_that_is_no_model_is_refused(
    target: str, merged_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--to", target, "--output-dir", tmp_path / "out", "--model")
    with pytest.raises(ArtifactError, match=r"nowhere not found: run step6_train_sft\.py first"):
        run_step(monkeypatch, *flags, tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="is not a finished artifact"):
        run_step(monkeypatch, *flags, merged_dir)


def test_the_fine_tuned_model_is_exported_by_default(pipeline: Runner) -> None:
    folder = pipeline.folder / "step8_export"
    reader = gguf.GGUFReader(folder / "model-F16.gguf")
    name = reader.get_field("general.name")
    assert name is not None and name.contents() == "step6_sft"
    small = pipeline.run("step8_export.py", "--dtype", "q8_0")
    assert "was made with dtype=None, not q8_0: pass --overwrite" in error_of(small)
    other = pipeline.run("step8_export.py", "--model", str(pipeline.folder / "step4_data"))
    assert "step4_data was made by step4_prepare_data, expected" in error_of(other)
