"""Architectures whose loss or document mask would be wrong are refused; the others are not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ja.bases.loading import check_training, load_model
from chatglm_ja.errors import DataError
from tests.tiny_models import SIZES, make_tiny

GATED = {"num_key_value_heads": 2, "intermediate_size": 96, "pad_token_id": 0}
GOOD: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in SIZES},
    "glm4": GATED | {"head_dim": 12},
    "mistral": GATED | {"sliding_window": 8},
    "olmo2": GATED,
    "phi3": GATED,
    "qwen2": GATED,
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": (GATED | {"head_dim": 12}, "not its output matrix times"),  # caps them
    "cohere": (GATED, "not its output matrix times"),  # scales them
    "granite": (GATED | {"logits_scaling": 2.0}, "not its output matrix times"),
    "phi": (GATED | {"num_key_value_heads": 4}, "not its output matrix times"),  # adds a bias
    "falcon": ({}, "ignores position ids"),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 48}, "ignores position ids"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "takes no position ids"),  # ALiBi
    "mamba": ({}, "takes no position ids"),  # recurrent
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", GOOD)
def test_what_can_be_trained_is_accepted(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = make_tiny(kind, tmp_path, **GOOD[kind])
    check_training(load_model(folder, dtype), folder)


@pytest.mark.parametrize("kind", BAD)
def test_what_would_be_trained_wrongly_is_refused(tmp_path: Path, kind: str) -> None:
    changes, message = BAD[kind]
    folder = make_tiny(kind, tmp_path, **changes)
    with pytest.raises(DataError, match=f"cannot be trained: .*{message}.*give another base"):
        check_training(load_model(folder, torch.float32), folder)
