"""Files as every step and every checkpoint keeps them: on the disk, hashed, in their folder.

A manifest records the size and SHA-256 of each file; `problem` says what has become of one since.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chatglm_ja.errors import ArtifactError

MANIFEST = "manifest.json"
# Larger files are hashed only where every byte is asked for: opening a 12 GB model takes no minute.
HASHED_BYTES = 2**30
# Inputs that no step made are hashed whole up to this size; of larger ones, such as a corpus, the
# size and three samples are.
SAMPLED_BYTES = 256 * 2**20
SAMPLE_BYTES = 2**20


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError for one that is none, or nested beyond what Python
    reads, and OSError for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from None


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_digest(path: Path) -> str:
    """The SHA-256 of a file, or of samples of a very large one."""
    size = path.stat().st_size
    if size <= SAMPLED_BYTES:
        return digest(path)
    sampled = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for offset in (0, size // 2, size - SAMPLE_BYTES):
            file.seek(offset)
            sampled.update(file.read(SAMPLE_BYTES))
    return sampled.hexdigest()


def record(path: Path) -> dict[str, Any]:
    """Bring a file to the disk; returns what a manifest says of it."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def problem(
    folder: Path, recorded: Mapping[str, Mapping[str, Any]], every_byte: bool = False
) -> str:
    """What is wrong with the first of a folder's files that is not as its manifest says, or "".

    Files of more than 1 GiB are compared by size only, unless `every_byte` is asked for.
    """

    def of_one(name: str) -> str:
        path = inside(folder, name)
        if not path.is_file():
            return f"{name} is missing"
        size, expected = path.stat().st_size, recorded[name]["bytes"]
        if size != expected:
            return f"{name} has {size} bytes, expected {expected}"
        if (every_byte or size <= HASHED_BYTES) and digest(path) != recorded[name]["sha256"]:
            return f"{name} does not have the SHA-256 of its manifest"
        return ""

    with ThreadPoolExecutor() as threads:  # hashing a large file holds no lock
        return next(filter(None, threads.map(of_one, recorded)), "")


def are_records(value: Any) -> bool:
    """Whether this is what a manifest says of files, by type."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        for entry in value.values()
    )


def inside(folder: Path, name: str) -> Path:
    """A file that a manifest or an index names. Raises ArtifactError if it is not in `folder`.

    Neither ".." nor an absolute path nor a link leads out; but for the hub's cache, whose folders
    hold links to the blobs beside them.
    """
    root = folder.resolve()
    try:
        path = (folder / name.replace("\0", "")).resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ArtifactError(f"{folder}: the file {name!r} cannot be reached ({error})") from None
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(path.is_relative_to(allowed) for allowed in roots):
        raise ArtifactError(
            f"{folder} names a file {name!r} that lies outside of it, at {path}: expected a file "
            "of the folder itself, which nobody has changed"
        )
    return folder / name
