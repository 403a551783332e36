"""What runs on the machines of a Ray cluster in test_cluster.py; they import little for it."""

import os
import time
from pathlib import Path
from typing import Any

from chatglm_ja.data import prepare_texts
from chatglm_ja.data.token_store import StoredChunk
from chatglm_ja.errors import DataError

tokenize_texts = prepare_texts.tokenize_texts


def describe(name: str) -> tuple[str, str, int]:
    """Return what a relative path leads to, and the folder and the process that it is read in."""
    if name == "bad":
        raise DataError("bad item")
    return Path(name).read_text(), str(Path.cwd()), os.getpid()


def die(_: int) -> None:
    os._exit(9)


def tokenize_or_hang(marker: Path, doomed: str, *arguments: Any) -> StoredChunk:
    """Tokenize a chunk; on the machine `doomed` the first never ends, and leaves a marker."""
    import ray

    if ray.get_runtime_context().get_node_id() == doomed:
        marker.touch()
        time.sleep(600)
    return tokenize_texts(*arguments)
