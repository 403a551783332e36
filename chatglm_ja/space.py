"""Room on the disk: about what every step takes, which is asked before it begins.

The sizes follow from settings, and from the sizes of what goes in; tests/test_space.py holds them
against what the steps write.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from chatglm_ja.config import PrepareDataConfig, TrainingConfig
from chatglm_ja.errors import ArtifactError
from chatglm_ja.sources import Source

WEIGHT_BYTES = 4  # trained weights are kept in float32
MOMENTS_BYTES = 3 * WEIGHT_BYTES  # a trained weight and its two moments
TOKEN_BYTES = 4
PIECE_BYTES = 60
MERGED_FORMS = 10  # all forms of a merged tokenizer, as multiples of what it is made of
# Texts are compressed to a quarter, and a token stands for three bytes or more of them.
COMPRESSION = 4
TEXT_BYTES_PER_TOKEN = 3
SIGNATURE_BYTES = 600  # of a document while near duplicates are searched for
DOCUMENT_BYTES = 2000  # of its text
REPORTS_BYTES = 20 * 10**6  # reports, curves, tables


def require(folder: Path, needed: int) -> None:
    """Raises ArtifactError when the disk of a folder, which may not be there yet, has less."""
    free = free_bytes(folder)
    if needed > free:
        raise ArtifactError(
            f"{folder} takes about {text(needed)}, but its disk has {text(free)} free: free some, "
            "or choose another --output-dir"
        )


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder that is there or will be."""
    path = folder.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def total_bytes(folder: Path, pattern: str = "*") -> int:
    """The size of all files in a folder, which need not be there."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def text(size: float) -> str:
    """Bytes for people: 3.2 MB, 8.1 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def of_learned(pieces: int) -> int:
    """A sentencepiece model of so many pieces, and their list."""
    return REPORTS_BYTES + PIECE_BYTES * pieces


def of_merged(base_model: Path, learned: Path) -> int:
    """A merged tokenizer; tokenizer.json is the largest of its forms."""
    models = [base_model / "tokenizer.model", learned]
    sizes = [m.stat().st_size if m.is_file() else total_bytes(m, "*.model") for m in models]
    return REPORTS_BYTES + MERGED_FORMS * sum(sizes)


def of_resized(base_model: Path, vocabulary: int) -> int:
    """The weights of a model folder, with rows for a vocabulary of that size."""
    from chatglm_ja import costs

    shape = costs.read_shape(base_model)
    before = shape.layer_weights + shape.embedding_weights
    after = before + 2 * max(vocabulary - shape.rows, 0) * shape.hidden
    return REPORTS_BYTES + weights_bytes(base_model) * after // before


def of_data(config: PrepareDataConfig) -> int:
    """The packed rows, and before that all texts and conversations as tokens."""
    texts = max(_text_bytes(config.sources), TEXT_BYTES_PER_TOKEN * config.total_tokens)
    talks = _text_bytes(config.sft_sources)
    work = (texts + 2 * talks) // TEXT_BYTES_PER_TOKEN * TOKEN_BYTES
    if config.near_duplicates:
        work += texts // DOCUMENT_BYTES * SIGNATURE_BYTES
    bins = config.sft_examples * config.max_length // 2
    rows = (config.total_tokens + config.validation_tokens + 2 * bins) * TOKEN_BYTES
    return REPORTS_BYTES + work + rows


def of_training(config: TrainingConfig) -> int:
    """Checkpoints, one more than are kept while it is written; the adapter, the merged model."""
    from chatglm_ja import costs

    trained = costs.trained_parameters(costs.read_shape(config.model), config).all
    checkpoints = MOMENTS_BYTES * trained * (config.keep_checkpoints + 1)
    return REPORTS_BYTES + checkpoints + WEIGHT_BYTES * trained + weights_bytes(config.model)


def weights_bytes(model: Path) -> int:
    """The size of a model folder's weights."""
    return total_bytes(model, "*.safetensors") or total_bytes(model, "*.bin")


def _text_bytes(sources: Sequence[Source]) -> int:
    """About how much text local sources hold; data sets by name count as nothing."""
    return sum(
        path.stat().st_size * (COMPRESSION if path.suffix in (".gz", ".parquet") else 1)
        for source in sources
        for path in source.files()
    )
