"""The files of a model folder: layouts, names of the weight files, and fingerprints of a base.

Nothing here imports torch, so that a step can look at its inputs before it loads anything.
"""

from pathlib import Path

from chatglm_ja.errors import ArtifactError
from chatglm_ja.settings import Choice
from chatglm_ja.storage.disk import folder_bytes
from chatglm_ja.storage.inputs import Input, open_files

MODEL_FILE = "tokenizer.model"
# Weights in one file, in order of preference. Sharded weights have an index: this name + INDEX.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
INDEX_FILE = WEIGHT_FILES[0] + INDEX  # what `write_sharded` writes


class Layout(Choice):
    """The names and files of a model that step 3 writes."""

    GLM = "glm", "transformers' own class, for steps 5 to 7"
    CHATGLM = "chatglm", "the original names and files, for tools that know only those"


def weights_bytes(folder: Path) -> int:
    """Return the size of the weights in a model folder, of either format."""
    sizes = (folder_bytes(folder, f"*{Path(name).suffix}") for name in WEIGHT_FILES)
    return next(filter(None, sizes), 0)


def open_base_tokenizer(folder: Path) -> Input:
    """Fingerprint the tokenizer of a ChatGLM3 folder, which must have a config.json as well."""
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            f"base model {folder} has no config.json: download ChatGLM3-6B there and set "
            "CHATGLM3_6B_DIR, or for the demo run demo/build_base_model.py"
        )
    return open_files("base_tokenizer", folder / MODEL_FILE)


def open_base_model(folder: Path) -> list[Input]:
    """Fingerprint a ChatGLM3 folder: its tokenizer, and its configuration and weights."""
    base_tokenizer = open_base_tokenizer(folder)
    weights: list[Path] = []
    for suffix in (Path(name).suffix for name in WEIGHT_FILES):
        weights = weights or [*folder.glob(f"*{suffix}"), *folder.glob(f"*{suffix}{INDEX}")]
    return [base_tokenizer, open_files("base_model", folder / "config.json", *sorted(weights))]
