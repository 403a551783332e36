"""The model to export: a folder of steps 3, 5 or 6, or one that another program wrote like them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_ja.chatglm3 import tensor_names, tokenizer
from chatglm_ja.chatglm3.base_config import read_glm_config
from chatglm_ja.errors import DataError
from chatglm_ja.storage.weights import Weights


@dataclass(frozen=True)
class ModelFolder:
    """A GlmForCausalLM on disk.

    config     its sizes, as ChatGLM3's config.json names them
    proto      its tokenizer.model (ModelProto), with the special tokens among the pieces
    weights    its tensors by GlmForCausalLM's names
    """

    folder: Path
    config: Mapping[str, Any]
    proto: Any
    weights: Weights

    @classmethod
    def open(cls, folder: Path) -> "ModelFolder":
        """Validate a folder's configuration, tokenizer and weights; read the weights' headers only.

        Raises DataError if one of them is missing, damaged, or of another kind of model, and if
        the embeddings have fewer rows than the tokenizer has ids.
        """
        path = folder / tokenizer.MODEL_FILE
        if (folder / "config.json").is_file() and not path.is_file():
            raise DataError(
                f"{folder} has no {tokenizer.MODEL_FILE}: step 8 exports models made of ChatGLM3; "
                "one of another base has the base's own layout already, which vLLM, the converter "
                "of llama.cpp and others read"
            )
        config = read_glm_config(folder)
        proto = tokenizer.read_proto(path)
        if not (tokenizer.is_lossless(proto) and tokenizer.has_special_tokens(proto)):
            raise DataError(
                f"{path} is not a tokenizer that step2_merge_tokenizer.py made of ChatGLM3's: "
                "expected a model of step 3, 5 or 6"
            )
        rows, ids = config["padded_vocab_size"], len(proto.pieces)
        if rows < ids:
            raise DataError(
                f"{folder}: the model has {rows:,} embedding rows, but its tokenizer has {ids:,} "
                "ids: they do not belong together, re-run the step that made the folder"
            )
        return cls(folder, config, proto, Weights(folder, tensor_names.glm_shapes(config)))

    @property
    def ids(self) -> dict[str, int]:
        """The id of every piece."""
        return {piece.piece: index for index, piece in enumerate(self.proto.pieces)}
