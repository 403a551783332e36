"""Resizing: old rows bit by bit, initialized new rows, and the verification."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import step3_resize_model
from chatglm_ja.bases import loading
from chatglm_ja.bases.chatglm3 import ChatGLM3Base
from chatglm_ja.chatglm3 import tensor_names, tokenizer, tokenizer_files
from chatglm_ja.errors import DataError
from chatglm_ja.settings import StepConfig
from chatglm_ja.storage import files, weights
from chatglm_ja.storage.inputs import open_artifact
from chatglm_ja.storage.output import Output
from chatglm_ja.storage.weight_files import INDEX_FILE
from chatglm_ja.vocabulary import embedding_rows
from chatglm_ja.vocabulary.initialization import CHUNK_ROWS, Initialization
from chatglm_ja.vocabulary.settings import ResizeModelConfig

Copy = Callable[[Path, Path], Path]


def resized(base: Path, tokenizer_dir: Path, output: Path, **changes: Any) -> None:
    output.mkdir()
    settings: dict[str, Any] = {"max_shard_gb": 0.001, **changes}
    config = ResizeModelConfig(
        output_dir=output, base_model=base, tokenizer=tokenizer_dir, **settings
    )
    embedding_rows.resize_checkpoint(embedding_rows.open_base(config), config, output)


def test_the_resized_folder_is_complete(resized_dir: Path, merged_proto: Any) -> None:
    rows = embedding_rows.padded_rows(len(merged_proto.pieces), 64)
    model = AutoModelForCausalLM.from_pretrained(resized_dir)
    assert model.dtype == torch.float16
    assert model.get_input_embeddings().weight.shape == (rows, 64)
    assert model.get_output_embeddings().weight.shape == (rows, 64)
    assert len(list(resized_dir.glob("model-*.safetensors"))) > 1
    fast = AutoTokenizer.from_pretrained(resized_dir)
    assert len(fast) == len(merged_proto.pieces)
    assert fast.model_max_length == model.config.max_position_embeddings
    stops = [2, 4000 + 6, 4000 + 8]
    settings = model.generation_config
    assert settings.eos_token_id == stops
    assert (settings.bos_token_id, settings.pad_token_id) == (1, 0)
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.8, 0.8)
    padding = list(range(len(merged_proto.pieces), rows))
    assert (model.generation_config.suppress_tokens or []) == padding


def test_new_rows_are_the_means_of_their_subtokens(
    base_dir: Path, resized_dir: Path, base_proto: Any, merge: Any
) -> None:
    """Computed from the base tokenizer itself: its ids after the dummy prefix and a line break."""
    old = load_file(base_dir / "model-00001-of-00003.safetensors")[tensor_names.EMBEDDING]
    new = weights.read_tensor(resized_dir, tensor_names.GLM_EMBEDDING)
    base = tokenizer.make_processor(base_proto)
    mark = base.encode("\n")[0]
    for offset, piece in enumerate(merge.added[:200]):
        # After a line break, which no merge crosses, the text is encoded as inside a document.
        ids = base.encode("\n" + piece.replace("▁", " "))
        assert ids[0] == mark
        mean = old[ids[2:]].double().mean(dim=0)
        assert torch.allclose(new[4009 + offset].double(), mean, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("init", Initialization)
@pytest.mark.parametrize("bias", [None, 0.5])
def test_resize_keeps_every_bit_of_the_old_rows(init: Initialization, bias: float | None) -> None:
    weight = torch.randn(12, 8).half()
    weight[3, 3] = torch.tensor(float("nan"))
    weight[4, 4] = -0.0
    generator = torch.Generator().manual_seed(0)
    grown = embedding_rows.resize_rows(weight, 10, [[1, 2], [5]], 16, init, generator, bias)
    assert torch.equal(grown[:10].view(torch.int16), weight[:10].view(torch.int16))
    assert grown.dtype == weight.dtype
    padding = (weight[10].float() + weight[11].float()) / 2 if bias else torch.zeros(8)
    assert torch.equal(grown[12:], padding.half().expand(4, -1))
    if init is Initialization.SUBTOKEN_MEAN:
        means = [(weight[1].float() + weight[2].float()) / 2, weight[5].float()]
        for row, mean in zip(grown[10:12], means, strict=True):
            assert torch.equal(row, (mean + (bias or 0) * padding).half())


@pytest.mark.parametrize("init", Initialization)
def test_an_initialization_of_many_rows(init: Initialization) -> None:
    """Computed in chunks, compared with torch's own functions over the whole matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(3 * CHUNK_ROWS + 17, 6, generator=generator) + 2).half()
    subtokens = [[i, i + 7, i % 11] for i in range(2 * CHUNK_ROWS + 5)]
    rows = len(weight) + len(subtokens)
    resized = embedding_rows.resize_rows(weight, len(weight), subtokens, rows, init, generator)
    new, old = resized[len(weight) :].double(), weight.double()
    if init is Initialization.RANDOM:
        assert torch.allclose(new.mean(dim=0), old.mean(dim=0), atol=0.1)
        assert torch.allclose(new.std(dim=0), old.std(dim=0), rtol=0.1)
        return
    expected = {
        Initialization.SUBTOKEN_MEAN: old[torch.tensor(subtokens)].mean(dim=1),
        Initialization.MEAN: old.mean(dim=0).expand_as(new),
    }
    assert torch.allclose(new, expected[init], atol=2e-3)


def test_padding_is_never_generated(base_dir: Path, merged_dir: Path, tmp_path: Path) -> None:
    """Neither by greedy decoding nor by sampling at a high temperature."""
    resized(base_dir, merged_dir, tmp_path / "model", pad_to_multiple=512)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    vocabulary = len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert model.config.vocab_size > vocabulary + 100
    prompt = torch.tensor([[4001, 4003, 5, 6]])
    torch.manual_seed(0)
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 10.0, "top_k": 0}):
        ids = model.generate(
            prompt.expand(8, -1), attention_mask=torch.ones(8, 4), max_new_tokens=40, **sampling
        )
        assert ids.max() < vocabulary


def test_verification_finds_a_changed_weight(
    base_dir: Path, merged_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    resized(base_dir, merged_dir, folder)
    embedding_rows.verify_logits(ChatGLM3Base.open(base_dir), folder)
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    name = tensor_names.NAMES[tensor_names.FINAL_NORM]
    shard = folder / index[name]
    tensors = load_file(shard)
    tensors[name][0] += 0.5
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(DataError, match="logits over the old ids differ from the base's by up to"):
        embedding_rows.verify_logits(ChatGLM3Base.open(base_dir), folder)


def test_the_original_layout_is_refused_by_later_steps(base_dir: Path) -> None:
    with pytest.raises(DataError, match="in the layout of chatglm, for other tools: run step3_"):
        loading.load_model(base_dir, "auto")


def test_a_tokenizer_of_another_base_is_refused(
    base_dir: Path, base_proto: Any, tmp_path: Path
) -> None:
    other = tokenizer.add_special_tokens(base_proto, ["あ"])
    other.pieces[1000].piece, other.pieces[1001].piece = (
        other.pieces[1001].piece,
        other.pieces[1000].piece,
    )
    (tmp_path / "tokenizer").mkdir()
    tokenizer_files.save_tokenizer(other, tmp_path / "tokenizer")
    with pytest.raises(DataError, match="was merged with another base"):
        resized(base_dir, tmp_path / "tokenizer", tmp_path / "model")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.model").write_bytes(base_proto.SerializeToString())
    with pytest.raises(DataError, match="holds no tokenizer of step 2"):
        resized(base_dir, tmp_path / "bare", tmp_path / "model2")


def add_prefix(base: Path) -> None:
    index = json.loads((base / INDEX_FILE).read_text())
    index["weight_map"]["transformer.prefix_encoder.embedding.weight"] = "prefix.safetensors"
    (base / INDEX_FILE).write_text(json.dumps(index))


def truncate(base: Path) -> None:
    shard = max(base.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])


def swap_pieces(base: Path) -> None:
    proto = tokenizer.read_proto(base / "tokenizer.model")
    first, second = proto.pieces[1000], proto.pieces[1001]
    first.piece, second.piece = second.piece, first.piece
    (base / "tokenizer.model").write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: None, None),
        (add_prefix, "comes from P-Tuning"),
        (truncate, "truncated or damaged"),
        (swap_pieces, "was merged with another base"),
    ],
)
def test_a_check_of_step_3_passes_what_the_run_would_pass(
    damage: Callable[[Path], None], message: str | None, base_dir: Path, merged_dir: Path,
    tmp_path: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = copy_of(base_dir, tmp_path / "base")
    damage(base)
    output = Output(StepConfig(output_dir=tmp_path / "merged"), "step2_merge_tokenizer", [])
    with output.write() as folder:
        shutil.copytree(merged_dir, folder, dirs_exist_ok=True)
    flags = ["--base-model", base, "--tokenizer", tmp_path / "merged", "--output-dir"]
    for more in (["--check"], []):
        argv = ["step3", *flags, tmp_path / "model", *more]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        if message:
            with pytest.raises(DataError, match=message):
                step3_resize_model.main()
        else:
            step3_resize_model.main()
        assert (tmp_path / "model").exists() == (message is None and not more)


def test_the_new_weights_are_hashed_only_while_they_are_written(
    base_dir: Path, merged_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(StepConfig(output_dir=tmp_path / "merged"), "step2_merge_tokenizer", [])
    with output.write() as folder:
        shutil.copytree(merged_dir, folder, dirs_exist_ok=True)
    read: list[Path] = []
    digest = files.digest

    def noting(path: Path) -> str:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(files, "digest", noting)
    flags = ["--base-model", base_dir, "--tokenizer", tmp_path / "merged"]
    argv = ["step3", *flags, "--output-dir", tmp_path / "model"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    step3_resize_model.main()
    again = {path.name for path in read if path.parent.name == ".model.writing"}
    assert "config.json" in again
    assert not [name for name in again if name.endswith(".safetensors")]
    open_artifact(tmp_path / "model", "step3_resize_model.py", every_byte=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_kept(
    dtype: torch.dtype, base_dir: Path, merged_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    base = copy_of(base_dir, tmp_path / "base")
    for path in base.glob("model-*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, path)
    resized(base, merged_dir, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == dtype
