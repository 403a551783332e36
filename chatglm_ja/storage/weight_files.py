"""The files that hold a model folder's weights, found without torch."""

from pathlib import Path

from chatglm_ja.storage.files import read_json

# Weights in one file, in order of preference. Sharded weights have an index: this name + INDEX.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
INDEX_FILE = WEIGHT_FILES[0] + INDEX  # what `write_sharded` writes


def weights_bytes(folder: Path) -> int:
    """Return the size of the weights in a model folder, of either format."""
    return sum(path.stat().st_size for path in find_weights(folder) if path.suffix != ".json")


def find_weights(folder: Path) -> list[Path]:
    """Return the files with weights, and their index, in the format of WEIGHT_FILES they have.

    Files that an index does not name are no part of the model: some bases bring their weights in
    another layout, too.
    """
    for name in WEIGHT_FILES:
        if weights := sorted(folder.glob(f"*{Path(name).suffix}")):
            indexes = sorted(folder.glob(f"*{Path(name).suffix}{INDEX}"))
            named = _read_names(indexes)
            return [*(w for w in weights if w.name in named or not named), *indexes]
    return []


def _read_names(indexes: list[Path]) -> set[str]:
    """Return the files that an index names; none if it is damaged, which is found out later."""
    try:
        return {name for path in indexes for name in read_json(path)["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
