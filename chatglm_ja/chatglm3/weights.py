"""ChatGLM3 checkpoints: read with the tensors of their config.json, loaded as a GlmForCausalLM."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from chatglm_ja.chatglm3 import tensor_names
from chatglm_ja.chatglm3.base_config import glm_config, read_config
from chatglm_ja.storage.weights import Weights


class BaseWeights(Weights):
    """The weights of a ChatGLM3 folder; `config` is its config.json, which is read if not given."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        self.config = read_config(folder) if config is None else config
        super().__init__(folder, tensor_names.expected_shapes(self.config), tensor_names.IGNORED)

    def glm_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over all tensors with the names and shapes of GlmForCausalLM."""
        for name, tensor in self.tensors():
            yield from tensor_names.to_glm(name, tensor, self.config)


def load_base(base: BaseWeights, dtype: torch.dtype) -> Any:
    """Load the weights of a ChatGLM3 folder as a GlmForCausalLM, in evaluation mode."""
    from transformers import GlmForCausalLM

    config = glm_config(base.config, base.config["padded_vocab_size"], dtype)
    with torch.device("meta"):
        model: Any = GlmForCausalLM(config)
    # Buffers (the rotary frequencies) are computed, not stored: take them from a fresh module.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    # Assigned instead of copied, so that memory holds the weights once.
    state = {name: tensor.to(dtype) for name, tensor in base.glm_tensors()}
    model.load_state_dict(state, assign=True)
    return model.eval()
