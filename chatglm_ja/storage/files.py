"""Reading, writing and hashing single files so that a crash never leaves a half-written one.

A file is published by writing it under a temporary name, flushing it to disk, and renaming it. A
manifest records the size and SHA-256 of each file; `find_problem` compares files with such records.

Not every file system has all that this takes: some NFS, Lustre, SMB and FUSE mounts lack locks,
hard links, file modes, or an fsync of folders. Where such a call fails, the step goes on without.
"""

import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict

from chatglm_ja.errors import ArtifactError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What a call fails with on a file system that lacks the feature.
UNSUPPORTED = frozenset(
    {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EMLINK, errno.ENOLCK, errno.ENOSYS,
     errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
)  # fmt: skip
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
    """Write a value as UTF-8 JSON with a final line break.

    Bytes of a file's name that are no UTF-8 are written as JSON's escapes, and read back as such.
    """
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


@contextmanager
def optional(feature: str, consequence: str) -> Iterator[None]:
    """Run a block that may fail where the file system lacks a feature: then only warn, once."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(feature, error.strerror, consequence)


@functools.cache
def _warn_once(feature: str, reason: str, consequence: str) -> None:
    log.warning("the file system has no %s (%s): %s", feature, reason, consequence)


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; return False if another process has locked it.

    On a file system without locks it is taken to be free, with a warning.
    """
    try:
        with optional("file locks", f"make sure that no other process writes beside {file.name}"):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to a file, or a copy where the file system has no hard links."""
    with optional("hard links", f"the files of {target.parent} are copied"):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def rename_or_remove(folder: Path, target: Path) -> None:
    """Rename a folder that is to be removed, so that a crash leaves nothing of it in its place.

    Where it cannot be renamed, such as a folder of a container's image, it is removed at once.
    """
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.rmtree(folder)


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
        # safetensors writes files that only their owner can read.
        if path.is_file() and path.stat().st_mode != mode:
            with optional("file modes", f"others may not be able to read {target}"):
                path.chmod(mode)
        fsync(path)
    old = replaced_path(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        rename_or_remove(target, old)
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
    with optional("fsync", "a power failure may lose what has just been written"):
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


def write_hashed(path: Path, parts: Sequence[bytes | memoryview]) -> FileRecord:
    """Write a file from its parts, hash them in a second thread meanwhile, and return its record.

    The SHA-256 is that of the parts in memory, so that a file as large as a model's is not read
    again for it. The file is not flushed to disk. An OSError names the file.
    """
    sha256 = hashlib.sha256()
    with ThreadPoolExecutor(1) as thread:  # hashing releases the GIL
        hashing = thread.map(sha256.update, parts)
        try:
            with open(path, "wb") as file:
                file.writelines(parts)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
    list(hashing)  # raises its error, if there was one
    return FileRecord(bytes=sum(map(len, parts)), sha256=sha256.hexdigest())


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
    """Return the path of a file that a manifest names.

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
        raise _outside(folder, name, path)
    return folder / name


def join_inside(folder: Path, name: str) -> Path:
    """Return the path of a file that the index of a user's own folder names.

    Raises ArtifactError for ".." and for an absolute path. What a link in the folder points to is
    the user's business: the hub's cache, another disk, a shared folder.
    """
    path = folder / name.replace("\0", "")
    if Path(name).is_absolute() or ".." in path.relative_to(folder).parts:
        raise _outside(folder, name, path)
    return path


def _outside(folder: Path, name: str, path: Path) -> ArtifactError:
    return ArtifactError(
        f"{folder} names a file {name!r} that lies outside of it, at {path}: expected a file "
        "in the folder itself; restore the original folder"
    )


def is_utf8(path: Path) -> bool:
    """Return whether a path is valid UTF-8, without which safetensors opens no file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def describe_absence(path: Path) -> str:
    """Say why a file cannot be opened: a folder, a link that leads nowhere, or nothing there."""
    if path.is_dir():
        return "is a folder, expected a file"
    if path.is_symlink():
        return f"is a link to {path.readlink()}, which does not exist"
    return "not found"
