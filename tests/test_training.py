"""Training in one process: what learns, what is saved, and that the merged model is the adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GlmForCausalLM

from chatglm_ja import checkpoint, layout, training
from chatglm_ja.config import TrainingConfig
from chatglm_ja.errors import ConfigError, DataError


def config_for(resized_dir: Path, data_dir: Path, output: Path, **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "model": resized_dir,
        "data": data_dir,
        "output_dir": output,
        "learning_rate": 1e-2,
        "embedding_learning_rate": 1e-2,
        "max_steps": 6,
        "evaluations": 4,
        "logging_steps": 1,
        "micro_batch_size": 8,
    }
    return TrainingConfig(**settings | changes)


@pytest.fixture(scope="module")
def trained(resized_dir: Path, data_dir: Path, tmp_path_factory: Any) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("trained")
    config = config_for(resized_dir, data_dir, folder)
    result = training.train(config, "pretrain", folder)
    training.write_merged(resized_dir, folder)
    return folder, result


def test_the_loss_falls_and_the_history_tells(trained: tuple[Path, dict]) -> None:
    _, result = trained
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert len(losses) == result["steps"] == 6
    assert losses[-1] < losses[0] - 0.2
    evaluated = [entry for entry in result["history"] if "eval_ja_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 2, 4, 6]


def test_lora_and_both_embeddings_learn_and_nothing_else(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path)
    model = training.load_for_training(config, torch.bfloat16)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    embeddings = {name for name in trained if name.endswith(training.EMBEDDINGS)}
    assert len(embeddings) == 2
    assert all("lora_" in name for name in trained - embeddings)
    # Six projections in each of three layers, two matrices each.
    assert len(trained - embeddings) == 6 * 3 * 2
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    # One copy of each embedding matrix: PEFT's modules_to_save would keep a second.
    rows = model.config.vocab_size
    assert sum(p.shape[0] == rows for p in model.parameters()) == 2
    frozen = training.load_for_training(
        config_for(resized_dir, data_dir, tmp_path, train_embeddings=False),
        torch.float32,
    )  # fmt: skip
    assert all("lora_" in n for n, p in frozen.named_parameters() if p.requires_grad)


def test_the_embeddings_have_their_own_learning_rate(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, embedding_learning_rate=0.0, max_steps=2)
    training.train(config, "pretrain", tmp_path)
    training.write_merged(resized_dir, tmp_path)
    for name in (layout.GLM_EMBEDDING, layout.GLM_LM_HEAD):
        before = AutoModelForCausalLM.from_pretrained(resized_dir).get_parameter(name)
        after = AutoModelForCausalLM.from_pretrained(tmp_path).get_parameter(name)
        assert torch.equal(before, after)


def test_the_merged_model_is_base_plus_adapter(
    trained: tuple[Path, dict], resized_dir: Path
) -> None:
    folder, _ = trained
    ids = torch.randint(300, 4000, (2, 30))
    base = GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / training.ADAPTER)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = adapted(ids).logits
        difference = (expected - merged(ids).logits).abs().max() / expected.abs().max()
    # The merged weights are stored as the base's are, in float16.
    assert difference < 2e-3
    lora = load_file(folder / training.ADAPTER / "adapter_model.safetensors")
    for target in ("self_attn.q_proj", "mlp.gate_up_proj"):
        name = f"model.layers.1.{target}"
        down, up = (lora[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        # alpha / rank is 2 by default.
        weight = checkpoint.read_tensor(resized_dir, f"{name}.weight").double() + 2 * up @ down
        found = merged.get_parameter(f"{name}.weight").double()
        assert torch.allclose(found, weight, rtol=1e-3, atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GlmForCausalLM"]


def test_all_embedding_rows_are_in_the_adapter(
    trained: tuple[Path, dict], resized_dir: Path
) -> None:
    folder, _ = trained
    before = AutoModelForCausalLM.from_pretrained(resized_dir)
    after = AutoModelForCausalLM.from_pretrained(folder)
    for name in (layout.GLM_EMBEDDING, layout.GLM_LM_HEAD):
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
        assert before.get_parameter(name).shape == after.get_parameter(name).shape


def test_sft_trains_on_bins(resized_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, micro_batch_size=2, max_steps=3)
    result = training.train(config, "sft", tmp_path)
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert losses[-1] < losses[0]


def test_accumulation_changes_nothing(resized_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """Training losses are normalised by the tokens of the whole step, validation by all tokens."""
    histories = []
    for micro, accumulation in ((8, 1), (2, 4)):
        config = config_for(
            resized_dir, data_dir, tmp_path, max_steps=4,
            micro_batch_size=micro, gradient_accumulation=accumulation,
        )  # fmt: skip
        result = training.train(config, "pretrain", None)
        names = ("loss", "eval_ja_loss", "eval_zh_loss", "eval_en_loss")
        histories.append([e[name] for e in result["history"] for name in names if name in e])
    assert len(histories[0]) > 8
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_a_loss_that_is_not_a_number_stops_at_once(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    model = GlmForCausalLM.from_pretrained(resized_dir)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    config = config_for(broken, data_dir, tmp_path, max_steps=50)
    with pytest.raises(DataError, match="the training loss became nan by step 1: lower"):
        training.train(config, "pretrain", None)


def test_a_batch_larger_than_the_data_is_refused(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, micro_batch_size=5000)
    with pytest.raises(DataError, match="125 rows, but a step takes 5000"):
        training.train(config, "pretrain", None)


def test_data_of_a_larger_vocabulary_is_refused(
    base_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    model = checkpoint.load_base(base_dir, torch.float32)
    model.resize_token_embeddings(1000)
    model.save_pretrained(small)
    config = config_for(small, data_dir, tmp_path)
    with pytest.raises(DataError, match="the model has 1000 embedding rows"):
        training.train(config, "pretrain", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
def test_fp16_needs_a_gpu(resized_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, precision="fp16")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        training.precision(config)
