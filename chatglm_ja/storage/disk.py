"""Disk space: how much is free, how much files take, and a check before a step begins."""

import os
import shutil
import sys
from pathlib import Path

from chatglm_ja.errors import ArtifactError


def require_free(folder: Path, needed: int, cure: str = "choose another --output-dir") -> None:
    """Raise ArtifactError if the disk of a folder that may not exist yet has too little space."""
    free = free_bytes(folder)
    if needed > free:
        raise ArtifactError(
            f"{folder} takes about {format_bytes(needed)}, but its disk has {format_bytes(free)} "
            f"free: free some, or {cure}"
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet.

    Some file systems do not say how much they have: then it is sys.maxsize.
    """
    try:
        total, _, free = shutil.disk_usage(existing_parent(folder))
    except OSError:
        total = 0
    return free if total else sys.maxsize


def existing_parent(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    path = folder.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Return the size of all files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def format_bytes(size: float) -> str:
    """Format a number of bytes with a decimal unit: 3.2 MB, 8.1 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
