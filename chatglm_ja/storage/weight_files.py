"""The files that hold a model folder's weights, found without torch."""

from pathlib import Path

from chatglm_ja.storage.disk import folder_bytes

# Weights in one file, in order of preference. Sharded weights have an index: this name + INDEX.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
INDEX_FILE = WEIGHT_FILES[0] + INDEX  # what `write_sharded` writes


def weights_bytes(folder: Path) -> int:
    """Return the size of the weights in a model folder, of either format."""
    sizes = (folder_bytes(folder, f"*{Path(name).suffix}") for name in WEIGHT_FILES)
    return next(filter(None, sizes), 0)


def find_weights(folder: Path) -> list[Path]:
    """Return the files with weights, and their index, in the format of WEIGHT_FILES they have."""
    for suffix in (Path(name).suffix for name in WEIGHT_FILES):
        if weights := [*folder.glob(f"*{suffix}"), *folder.glob(f"*{suffix}{INDEX}")]:
            return sorted(weights)
    return []
