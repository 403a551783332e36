"""Sizes from config.json alone, compared with the real model."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from chatglm_ja.bases.shape import read_shape
from chatglm_ja.errors import ConfigError, DataError
from tests.tiny_models import SIZES, make_tiny


@pytest.mark.parametrize("kind", SIZES)
def test_parameters_are_those_of_the_model(tmp_path: Path, kind: str) -> None:
    """Tied embeddings count once."""
    model: Any = AutoModelForCausalLM.from_pretrained(make_tiny(kind, tmp_path))
    (tmp_path / "model.safetensors").unlink()  # config.json is enough
    shape = read_shape(tmp_path)
    embedding = model.get_input_embeddings().weight
    assert shape.weights == sum(parameter.numel() for parameter in model.parameters())
    assert shape.embeddings == 2 - model.config.tie_word_embeddings
    assert (shape.rows, shape.hidden) == tuple(embedding.shape) == (320, 48)
    assert (shape.layers, shape.heads, shape.ffn, shape.positions) == (2, 4, 96, 256)
    assert shape.attention == {"llama": 48, "qwen3": 64, "glm": 64, "gpt2": 48}[kind]
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "wpe" not in n
    )
    assert shape.layers * sum(linear.weights for linear in shape.linears) == (
        matrices - shape.embedding_weights
    )


def test_layers_with_the_same_input_are_a_stage(tmp_path: Path) -> None:
    stages = read_shape(make_tiny("llama", tmp_path)).stages
    assert [[linear.name for linear in stage] for stage in stages] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip


def test_a_name_that_no_layer_has_is_refused(tmp_path: Path) -> None:
    shape = read_shape(make_tiny("gpt2", tmp_path))
    assert [linear.inputs for linear in shape.find_linears(("c_proj",))] == [48, 96]
    assert shape.find_linears(()) == shape.linears
    with pytest.raises(ConfigError, match=r"names q_proj: .* model have c_attn, c_proj, c_fc$"):
        shape.find_linears(("c_proj", "q_proj"))


def test_experts_are_refused(tmp_path: Path) -> None:
    """They are stacked matrices, which are not linear layers."""
    folder = make_tiny("mixtral", tmp_path, num_key_value_heads=2, intermediate_size=96)
    with pytest.raises(DataError, match=r"weights of shape .* in .*experts.*: LoRA cannot"):
        read_shape(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": "many"}, "is no configuration that transformers reads"),
        ({"num_key_value_heads": 0}, "describes no model that transformers builds"),
        ({"model_type": "bert"}, "LlamaForCausalLM is no decoder"),
        ({"model_type": 3}, "names no model_type"),
    ],
)
def test_a_config_of_no_model_is_one_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = make_tiny("llama", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message) as caught:
        read_shape(tmp_path)
    assert "\n" not in str(caught.value)
