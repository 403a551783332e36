"""Only the added rows are trained; the base's rows stay bit-identical."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GlmForCausalLM

from chatglm_ja.chatglm3 import tensor_names, tokenizer
from chatglm_ja.errors import ConfigError
from chatglm_ja.training import merge_lora, new_rows, train
from tests.training.runs import checkpoints_in, config_for


def first_new(folder: Path) -> int:
    return tokenizer.load_processor(folder).piece_to_id("<|observation|>") + 1


def test_a_split_model_computes_the_same(resized_dir: Path) -> None:
    model: Any = GlmForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    first = first_new(resized_dir)
    ids = torch.tensor([[5, first - 1, first, first + 1, model.config.vocab_size - 1, 0]])
    whole = model(ids).logits
    whole.square().mean().backward()
    expected = {
        name: model.get_parameter(name).grad
        for name in (tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD)
    }
    new_rows.split_embeddings(model, first)
    split = model(ids).logits
    assert torch.equal(split, whole)
    split.square().mean().backward()
    for part, grad in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()),
        expected.values(),
        strict=True,
    ):
        assert part.old.grad is None
        assert torch.allclose(part.new.grad, grad[first:], atol=1e-7)
    stored = GlmForCausalLM.from_pretrained(resized_dir)
    names = (tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD)
    new_rows.join_embeddings(model, *(stored.get_parameter(name).detach() for name in names))
    assert torch.equal(model(ids).logits, whole)
    assert sorted(model.state_dict()) == sorted(
        GlmForCausalLM.from_pretrained(resized_dir).state_dict()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_s_rows_stay_and_the_new_ones_learn(
    resized_dir: Path, data_dir: Path, tmp_path: Path, precision: str
) -> None:
    """Bit-identical in the stored float16, which bfloat16 cannot represent."""
    config = config_for(
        resized_dir, data_dir, tmp_path, embedding_rows="new", save_steps=3, precision=precision
    )
    result = train.train(config, "pretrain", tmp_path, checkpoints_in(tmp_path))
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    merge_lora.write_merged(resized_dir, tmp_path)
    first = first_new(resized_dir)
    before = AutoModelForCausalLM.from_pretrained(resized_dir)
    after = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in (tensor_names.GLM_EMBEDDING, tensor_names.GLM_LM_HEAD):
        old, new = before.get_parameter(name), after.get_parameter(name)
        assert torch.equal(old[:first], new[:first])
        assert not torch.equal(old[first:], new[first:])
    width, rows = before.config.hidden_size, before.config.vocab_size
    whole = train.train(config_for(resized_dir, data_dir, tmp_path, max_steps=1), "pretrain", None)
    assert whole["trained_parameters"] - result["trained_parameters"] == 2 * first * width
    assert first < rows


def test_the_first_loss_does_not_depend_on_the_rows(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    losses = []
    for rows in ("all", "new"):
        config = config_for(resized_dir, data_dir, tmp_path, max_steps=1, embedding_rows=rows)
        history = train.train(config, "pretrain", None)["history"]
        losses.append(next(entry["loss"] for entry in history if "loss" in entry))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_new_rows_without_embeddings_are_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--embedding-rows new trains embeddings"):
        config_for(tmp_path, tmp_path, tmp_path, embedding_rows="new", train_embeddings=False)
