"""The family of a folder, and its base, tokenizer and files opened as what that family has.

A base is told by its config.json, a folder of steps 2 to 6 by its tokenizer. This module is
imported for `--help`, so it imports a family only when it opens one.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm_ja.chatglm3 import base_config
from chatglm_ja.errors import ArtifactError, DataError
from chatglm_ja.storage.files import describe_absence, digest, read_json
from chatglm_ja.storage.inputs import Input, open_artifact, open_files
from chatglm_ja.storage.manifest import read_manifest
from chatglm_ja.storage.recognition import recognize_folder
from chatglm_ja.storage.weight_files import find_weights

if TYPE_CHECKING:
    from chatglm_ja.bases.interface import Base, ModelTokenizer

# The error of a step whose base model nobody has named.
NO_BASE_MODEL = (
    "CHATGLM3_6B_DIR is not set: set it to the folder of the downloaded ChatGLM3-6B, or pass "
    "--base-model"
)
SPECIAL_TOKEN = b"[gMASK]"  # one of ChatGLM3's, in a tokenizer.model that step 2 wrote
# What tokenizers are made of, in either family.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "added_tokens.json",
)
MORE_TEMPLATES = "additional_chat_templates"  # a folder, if a base has several


def open_base(folder: Path) -> "Base":
    """Open and validate a base model. Raises DataError for one that the pipeline cannot extend."""
    if is_chatglm3(folder):
        from chatglm_ja.bases.chatglm3 import ChatGLM3Base

        return ChatGLM3Base.open(folder)
    from chatglm_ja.bases.transformers import TransformersBase

    return TransformersBase.open(folder)


def load_tokenizer(folder: Path) -> "ModelTokenizer":
    """Load the tokenizer of step 2's folder, of a model, or of a base. Raises DataError."""
    if has_chatglm3_tokenizer(folder):
        from chatglm_ja.bases.chatglm3 import ChatGLM3Tokenizer

        return ChatGLM3Tokenizer.open(folder)
    from chatglm_ja.bases.transformers import TransformersTokenizer

    return TransformersTokenizer.open(folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of step 2's folder, or of a model's, into a model's folder."""
    for path in tokenizer_files(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in a folder that belong to its tokenizer."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return [*files, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]


def is_chatglm3(folder: Path) -> bool:
    """Return whether a base is in ChatGLM3's published layout, by the model type in config.json.

    Raises DataError if that file is missing or damaged.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path} not found: expected the folder of a base model") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str):
        raise DataError(f"{path} names no model_type: expected the config.json of a base model")
    return model_type == base_config.REQUIRED_CONFIG["model_type"]


def has_chatglm3_tokenizer(folder: Path) -> bool:
    """Return whether the tokenizer of a model's folder, or of step 2's, is of the family chatglm3.

    That of Llama 2 has a tokenizer.model, too, which lacks ChatGLM3's special tokens. The published
    one of ChatGLM3 lacks them as well, but not the config.json.
    """
    path = folder / base_config.MODEL_FILE
    if not path.is_file():
        return False
    return SPECIAL_TOKEN in path.read_bytes() or (
        (folder / "config.json").is_file() and is_chatglm3(folder)
    )


def open_base_tokenizer(folder: Path) -> Input:
    """Fingerprint the tokenizer of a base's folder, which must have a config.json as well."""
    path = folder / "config.json"
    if path.is_symlink() and not path.exists():
        raise ArtifactError(f"base model: {path} {describe_absence(path)}: restore it")
    if not path.exists() and (found := recognize_folder(folder)):
        raise ArtifactError(f"base model {folder} has no config.json, but {found}")
    if not path.is_file():
        found = "has no config.json" if folder.is_dir() else "not found"
        if folder.is_file():
            found = "is a file, expected the folder of the model"
        raise ArtifactError(
            f"base model {folder.absolute()} {found}: for the demo, run demo/build_base_model.py; "
            "for the profile smollm2, demo/get_smollm2.py; for the real model, set "
            "CHATGLM_JA_PROFILE=chatglm3-6b, and CHATGLM3_6B_DIR to its folder"
        )
    if is_chatglm3(folder):
        return open_files("base_tokenizer", folder / base_config.MODEL_FILE)
    return open_files("base_tokenizer", *tokenizer_files(folder))


def open_base_model(folder: Path, merged: Path | None = None) -> list[Input]:
    """Fingerprint a base's folder: its tokenizer, and its configuration and weights.

    `merged` is step 2's output, if it is an input beside this one. A folder whose tokenizer is that
    of `merged`, byte for byte, as step 8 writes it, brings no other: the one that `merged` was made
    from counts.
    """
    tokenizers = [open_base_tokenizer(folder)]
    own = merged / base_config.MODEL_FILE if merged is not None else None
    base_file = folder / base_config.MODEL_FILE
    if own and own.is_file() and base_file.is_file() and digest(own) == digest(base_file):
        tokenizers = []
    return [*tokenizers, open_files("base_model", folder / "config.json", *find_weights(folder))]


def open_model(folder: Path, *scripts: str, every_byte: bool | None = None) -> Input:
    """Open a model that one of the steps published, or that was trained further by another program:
    then by its files.
    """
    if read_manifest(folder) is None and (folder / "config.json").is_file():
        files = (folder / "config.json", *tokenizer_files(folder), *find_weights(folder))
        return open_files("model", *files)
    return open_artifact(folder, *scripts, every_byte=every_byte)
