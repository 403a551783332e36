"""ChatGLM3's own layout: the bits of every tensor, and a base for the steps again."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import step3_resize_model
import step8_export
from chatglm_ja.bases import loading
from chatglm_ja.bases.chatglm3 import ChatGLM3Base
from chatglm_ja.chatglm3 import tensor_names, tokenizer
from chatglm_ja.chatglm3.weights import BaseWeights, load_base
from chatglm_ja.errors import DataError
from chatglm_ja.export import original_layout
from chatglm_ja.export.model_folder import ModelFolder
from chatglm_ja.settings import StepConfig
from chatglm_ja.storage import weights
from chatglm_ja.storage.output import Output
from chatglm_ja.vocabulary import merging
from chatglm_ja.vocabulary.policies import Policy
from tests.chatglm3.test_remote_code import with_remote_code
from tests.pipeline import Runner

Copy = Callable[[Path, Path], Path]


def exported(model: Path, base: Path | None, folder: Path, shard: int = 1_000_000) -> Path:
    opened = ModelFolder.open(model)
    folder.mkdir()
    original_layout.write_original_layout(
        opened, original_layout.read_base(opened, base), shard, folder
    )
    return folder


def test_every_tensor_keeps_its_bits(base_dir: Path, resized_dir: Path, tmp_path: Path) -> None:
    folder = exported(resized_dir, base_dir, tmp_path / "out")
    back = BaseWeights(folder)
    stored = dict(weights.iterate_tensors(resized_dir))
    tensors = dict(back.glm_tensors())
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.int16), stored[name].view(torch.int16))
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    rows = back.tensor(tensor_names.EMBEDDING).shape[0]
    config = json.loads((folder / "config.json").read_text())
    expected = json.loads((base_dir / "config.json").read_text()) | {"padded_vocab_size": rows}
    del expected["auto_map"]  # the base has none of the Python files that it names
    assert config == expected
    assert (folder / "tokenizer.model").read_bytes() == (
        resized_dir / "tokenizer.model"
    ).read_bytes()


def test_it_computes_what_chatglm3_computes(
    base_dir: Path, resized_dir: Path, tmp_path: Path
) -> None:
    folder = exported(resized_dir, base_dir, tmp_path / "out")
    expected = load_file(base_dir / "expected.safetensors")
    model = load_base(BaseWeights(folder), torch.float32)
    for index in range(3):
        with torch.inference_mode():
            logits = model(expected[f"ids_{index}"]).logits[0, -1, :4009]
        assert torch.allclose(logits, expected[f"logits_last_{index}"][:4009], rtol=0, atol=1e-5)


def test_without_a_base_the_config_is_made_from_the_models(
    resized_dir: Path, tmp_path: Path
) -> None:
    folder = exported(resized_dir, tmp_path / "nowhere", tmp_path / "out")
    base = ChatGLM3Base.open(folder)
    assert base.config["torch_dtype"] == "float16"
    assert (
        dict(base.weights.glm_tensors()).keys() == dict(weights.iterate_tensors(resized_dir)).keys()
    )


def test_the_bases_python_files_are_patched(
    base_dir: Path, resized_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    base = with_remote_code(copy_of(base_dir, tmp_path / "base"))
    folder = exported(resized_dir, base, tmp_path / "out")
    assert "token: 4000 + offset" in (folder / "tokenization_chatglm.py").read_text()
    assert (folder / "configuration_chatglm.py").is_file()
    assert not (folder / "tokenizer.json").exists()
    config = (folder / "tokenizer_config.json").read_bytes()
    assert config == (base_dir / "tokenizer_config.json").read_bytes()
    # An export of the export is the same.
    again = exported(resized_dir, folder, tmp_path / "again")
    for path in folder.glob("*.py"):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_another_base_is_refused(
    base_dir: Path, resized_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    other = copy_of(base_dir, tmp_path / "other")
    proto = tokenizer.read_proto(other / "tokenizer.model")
    first, second = proto.pieces[1000], proto.pieces[1001]
    first.piece, second.piece = second.piece, first.piece
    (other / "tokenizer.model").write_bytes(proto.SerializeToString())
    config = json.loads((other / "config.json").read_text()) | {"num_layers": 28}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        DataError, match=r"is not the base of .*: num_layers is 28, expected 3, its pieces are"
    ):
        exported(resized_dir, other, tmp_path / "out")


def published(folder: Path, step: str, source: Path) -> Path:
    output = Output(StepConfig(output_dir=folder), step, [])
    with output.write() as working:
        shutil.copytree(source, working, dirs_exist_ok=True)
    return folder


def test_more_pieces_can_be_added_to_an_export(
    base_dir: Path,
    resized_dir: Path,
    merged_proto: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another language: steps 2 and 3 on the export keep all ids, rows and logits."""
    base = ChatGLM3Base.open(exported(resized_dir, base_dir, tmp_path / "base"))
    more = merging.merge_pieces(base.vocabulary, ["한", "국", "한국"], Policy.ALL)
    assert more.added == ["한", "국", "한국"]
    (tmp_path / "files").mkdir()
    more.vocabulary.save(tmp_path / "files")
    pieces = tokenizer.read_proto(tmp_path / "files" / tokenizer.MODEL_FILE).pieces
    assert pieces[: len(merged_proto.pieces)] == merged_proto.pieces
    step2 = published(tmp_path / "step2", "step2_merge_tokenizer", tmp_path / "files")
    flags = ["--base-model", base.folder, "--tokenizer", step2, "--output-dir", tmp_path / "model"]
    monkeypatch.setattr(sys, "argv", ["step3", *map(str, flags)])
    step3_resize_model.main()  # verifies rows and logits
    grown: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    old: Any = AutoModelForCausalLM.from_pretrained(resized_dir)
    ids = len(merged_proto.pieces)
    before, after = old.get_input_embeddings().weight, grown.get_input_embeddings().weight
    assert torch.equal(before[:ids], after[:ids])
    assert torch.allclose(after[ids + 2].float(), after[ids : ids + 2].float().mean(0), atol=1e-2)


def test_the_fine_tuned_model_is_read_back(
    pipeline: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By step 3, with the tokenizer of its own step 2: logits and weights are the same bits."""
    sft, base = pipeline.folder / "step6_sft", tmp_path / "base"
    flags = ["--model", sft, "--to", "chatglm", "--output-dir", base]
    flags += ["--base-model", pipeline.folder / "base_model"]
    monkeypatch.setattr(sys, "argv", ["step8", *map(str, flags)])
    step8_export.main()
    flags = ["--base-model", base, "--tokenizer", pipeline.folder / "step2_tokenizer"]
    flags += ["--output-dir", tmp_path / "model"]
    monkeypatch.setattr(sys, "argv", ["step3", *map(str, flags)])
    step3_resize_model.main()
    prompts = [[5, 3001, 7, 8, 9, 300], [11, 12]]
    rows = ModelFolder.open(sft).config["padded_vocab_size"]
    models = [
        loading.load_model(sft, torch.float32).eval(),
        load_base(BaseWeights(base), torch.float32),
        loading.load_model(tmp_path / "model", torch.float32).eval(),
    ]
    expected, *others = [loading.compute_logits(model, prompts, rows) for model in models]
    for logits in others:
        for ours, theirs in zip(logits, expected, strict=True):
            assert torch.equal(ours[0], theirs[0])
    # Steps 5 to 7 compare what the model and the data were made from.
    data = json.loads((pipeline.folder / "step4_data" / "manifest.json").read_text())
    model = json.loads((tmp_path / "model" / "manifest.json").read_text())
    for role in ("base_tokenizer", "step2_merge_tokenizer"):
        assert model["lineage"][role] == data["lineage"][role]
