"""A model in ChatGLM3's own layout: its names, fused matrices, config.json and Python files.

What this writes is a base for steps 1 to 7, such as for one more language: its tokenizer.model
holds the special tokens and the pieces that were added, and all tensors keep their bits.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from chatglm_ja.bases.chatglm3 import ChatGLM3Base
from chatglm_ja.chatglm3 import remote_code, tensor_names, tokenizer
from chatglm_ja.chatglm3.base_config import SIZES
from chatglm_ja.chatglm3.tokenizer_files import TOKENIZER_FILES
from chatglm_ja.errors import DataError
from chatglm_ja.export.model_folder import ModelFolder
from chatglm_ja.storage import weights
from chatglm_ja.storage.files import FileRecord, write_json

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
ROWS = "padded_vocab_size"  # the only size in which a base may differ


@dataclass(frozen=True)
class BaseFiles:
    """What is taken over from the base: its config.json, and the texts of its Python files."""

    config: Mapping[str, Any]
    code: Mapping[str, str]


def read_base(model: ModelFolder, folder: Path | None) -> BaseFiles:
    """Read the files of the base that the model was made from; a base may have none of them.

    Raises DataError if it is not the model's base, with other sizes or pieces, and if its Python
    files are not ChatGLM3-6B's own.
    """
    if folder is None or not (folder / "config.json").is_file():
        log.info("there is no base model%s: config.json is made from the model's, and no Python "
                 "files are copied", f" in {folder}" if folder else "")  # fmt: skip
        return BaseFiles({}, {})
    base = ChatGLM3Base.open(folder)
    problems = [
        f"{name} is {base.config[name]}, expected {model.config[name]}"
        for name in SIZES
        if name != ROWS and base.config[name] != model.config[name]
    ]
    pieces = [piece.piece for piece in tokenizer.add_special_tokens(base.proto).pieces]
    if pieces != [piece.piece for piece in model.proto.pieces[: len(pieces)]]:
        problems.append("its pieces are others")
    if problems:
        raise DataError(
            f"{folder} is not the base of {model.folder}: {', '.join(problems)}: give the folder "
            "of its base as --base-model"
        )
    code = remote_code.read_code(folder, model.ids[tokenizer.SPECIAL_TOKENS[0]])
    if not code:
        log.info("%s has no %s and %s: no Python files are copied",
                 folder, remote_code.MODELING, remote_code.TOKENIZATION)  # fmt: skip
    return BaseFiles(base.config, code)


def write_original_layout(
    model: ModelFolder, base: BaseFiles, max_shard_bytes: int, folder: Path
) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    """Write all files of a ChatGLM3 folder, weights in the stored dtype.

    Returns their numbers, and the records of the shards.
    """
    for name, text in base.code.items():
        (folder / name).write_text(text, encoding="utf-8")
    # ChatGLM3's own tokenizer class reads nothing but the sentencepiece model.
    own = (tokenizer.MODEL_FILE,) if base.code else TOKENIZER_FILES
    for name in (*own, GENERATION_CONFIG):
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    dtype = str(model.weights.dtype).removeprefix("torch.")
    config = {**base.config, **model.config, "torch_dtype": dtype}
    if not base.code:
        config.pop("auto_map", None)  # which names classes of the Python files
    write_json(folder / "config.json", config, indent=2)
    progress = tqdm(_original_tensors(model), desc="writing", unit=" tensors")
    records = weights.write_sharded(progress, folder, max_shard_bytes)
    return {"dtype": dtype, "rows": model.config[ROWS], "python_files": len(base.code)}, records


def _original_tensors(model: ModelFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over all tensors by ChatGLM3's names, in an order that opens each shard once."""

    def place(name: str) -> tuple[str, str]:
        return model.weights.place(tensor_names.glm_names(name)[0])

    for name in sorted(tensor_names.expected_shapes(model.config), key=place):
        yield name, tensor_names.to_chatglm(name, model.weights.tensor)
