"""Reading, writing and hashing single files so that a crash never leaves a half-written one.

A file is published by writing it under a temporary name, flushing it to disk, and renaming it. A
manifest records the size and SHA-256 of each file; `find_problem` compares files with such records.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from chatglm_ja.errors import ArtifactError

MANIFEST = "manifest.json"
# Larger files are hashed only on request, so that opening a 12 GB model does not take a minute.
HASHED_BYTES = 2**30
# Inputs that no step wrote are hashed whole up to this size. Of larger files, such as a corpus, the
# size and three samples are hashed.
SAMPLED_BYTES = 256 * 2**20
SAMPLE_BYTES = 2**20


class FileRecord(BaseModel):
    """What a manifest records of a file."""

    model_config = ConfigDict(frozen=True, strict=True)

    bytes: int
    sha256: str


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises ValueError if the file is not JSON or is nested deeper than Python's parser allows, and
    OSError if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from None


def write_json(path: Path, value: Any, indent: int | None = 1, sort_keys: bool = False) -> None:
    """Write a value as UTF-8 JSON with a final line break."""
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success flush it to disk and rename it to `path`."""
    partial = path.with_name(f"{path.name}.part")
    try:
        yield partial
        fsync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def publish_folder(working: Path, target: Path) -> None:
    """Flush a finished folder to disk and rename it to `target`, replacing what is there.

    All files get the mode of its manifest, which is what the umask allows.
    A crash leaves either folder whole. Between the two renames the old one is at
    `replaced_path(target)`; `restore_replaced` moves it back.
    """
    mode = (working / MANIFEST).stat().st_mode
    for path in (working, *working.rglob("*")):
        if path.is_file():
            path.chmod(mode)  # safetensors writes files that only their owner can read
        fsync(path)
    old = replaced_path(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    working.rename(target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def replaced_path(target: Path) -> Path:
    """Where `publish_folder` keeps the old folder while it is being replaced."""
    return target.with_name(f".{target.name}.old")


def restore_replaced(target: Path) -> None:
    """Undo a replacement that a crash interrupted between its two renames."""
    old = replaced_path(target)
    if old.exists() and not target.exists():
        old.rename(target)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_digest(path: Path) -> str:
    """Return the SHA-256 of a file; of a file over 256 MiB, that of its size and three samples."""
    size = path.stat().st_size
    if size <= SAMPLED_BYTES:
        return digest(path)
    sampled = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for offset in (0, size // 2, size - SAMPLE_BYTES):
            file.seek(offset)
            sampled.update(file.read(SAMPLE_BYTES))
    return sampled.hexdigest()


def record_file(path: Path) -> FileRecord:
    """Flush a file to disk and return its record."""
    fsync(path)
    return FileRecord(bytes=path.stat().st_size, sha256=digest(path))


def find_problem(
    folder: Path, records: Mapping[str, FileRecord], every_byte: bool = False
) -> str | None:
    """Compare the files of a folder with their records; return the first difference, or None.

    Files over 1 GiB are compared by size only, unless `every_byte` is set.
    """

    def find_in_file(name: str) -> str | None:
        path, expected = resolve_inside(folder, name), records[name]
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{name} has {size} bytes, expected {expected.bytes}"
        if (every_byte or size <= HASHED_BYTES) and digest(path) != expected.sha256:
            return f"{name} does not have the SHA-256 of its manifest"
        return None

    with ThreadPoolExecutor() as threads:  # hashing releases the GIL
        return next(filter(None, threads.map(find_in_file, records)), None)


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a manifest or an index names.

    Raises ArtifactError if "..", an absolute path or a link leads out of `folder`. The folders of
    the hub's cache are an exception: they hold links to the blobs beside them.
    """
    root = folder.resolve()
    try:
        path = (folder / name.replace("\0", "")).resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ArtifactError(f"{folder}: the file {name!r} cannot be reached ({error})") from None
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(path.is_relative_to(parent) for parent in allowed):
        raise ArtifactError(
            f"{folder} names a file {name!r} that lies outside of it, at {path}: expected a file "
            "in the folder itself; restore the original folder"
        )
    return folder / name
