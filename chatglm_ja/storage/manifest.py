"""The manifest of an artifact folder: what was made, from what, and the hash of every file.

Each step publishes its folder with a manifest.json: the step's arguments, counts and package
versions, the size and SHA-256 of every file, and the fingerprint of every input. A fingerprint
depends on file contents only, so re-running a step on the same inputs keeps later artifacts valid.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from chatglm_ja.errors import ArtifactError
from chatglm_ja.storage import files
from chatglm_ja.storage.files import MANIFEST, FileRecord

PACKAGES = (
    "torch", "transformers", "tokenizers", "sentencepiece", "peft", "deepspeed", "datasets",
    "accelerate", "safetensors",
)  # fmt: skip


class InputRecord(BaseModel):
    """An input of a step: its fingerprint and, if it is an artifact, the relative path to it."""

    model_config = ConfigDict(frozen=True, strict=True)

    path: str | None
    fingerprint: str


class Manifest(BaseModel):
    """The content of manifest.json.

    inputs     what the step read, by role
    lineage    the fingerprint of every ancestor, by role
    files      every other file of the folder, by its path within it
    """

    model_config = ConfigDict(strict=True)

    step: str
    arguments: dict[str, Any]
    counts: dict[str, Any]
    inputs: dict[str, InputRecord]
    lineage: dict[str, str]
    versions: dict[str, str] = {}
    fingerprint: str = ""  # empty before the folder is published
    files: dict[str, FileRecord]

    def input_paths(self, folder: Path) -> dict[str, Path]:
        """Return the folders of the artifacts among the inputs; `folder` is the manifest's own."""
        return {
            role: Path(os.path.normpath(folder / entry.path))
            for role, entry in self.inputs.items()
            if entry.path is not None
        }


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of an artifact folder, or None if it has none.

    Raises ArtifactError if the manifest is damaged.
    """
    try:
        return Manifest.model_validate(files.read_json(folder / MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValidationError, ValueError):
        raise ArtifactError(
            f"{folder / MANIFEST} is damaged: remove {folder} and re-run the step that makes it"
        ) from None


def read_history(folder: Path) -> dict[str, Manifest]:
    """Return the manifests of an artifact folder and of all its ancestors, by step, in order."""
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    manifests: dict[str, Manifest] = {}
    for path in manifest.input_paths(folder).values():
        manifests |= read_history(path)
    return dict(sorted((manifests | {manifest.step: manifest}).items()))


def check_files(folder: Path, manifest: Manifest, every_byte: bool | None) -> None:
    """Raise ArtifactError if a file of the folder differs from its record."""
    problem = files.find_problem(folder, manifest.files, bool(every_byte))
    if problem:
        raise ArtifactError(f"{folder}: {problem}: run {manifest.step}.py --overwrite")


def check_inputs_unchanged(
    folder: Path, manifest: Manifest, descendants: tuple[Path, ...] = ()
) -> None:
    """Raise ArtifactError if an input artifact, or one of its ancestors, has been made again since.

    `descendants` are the folders whose inputs are being followed.
    """
    if folder in descendants:
        raise ArtifactError(f"{folder} is recorded as its own ancestor: make it again")
    for role, path in manifest.input_paths(folder).items():
        current = read_manifest(path)
        if current is None:
            continue
        recorded = manifest.inputs[role].fingerprint
        if current.fingerprint != recorded:
            raise ArtifactError(
                f"{folder} was made from {role} {shorten(recorded)}, but {path} is now "
                f"{shorten(current.fingerprint)}: run {manifest.step}.py --overwrite"
            )
        check_inputs_unchanged(path, current, (*descendants, folder))


def read_versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 for a mapping of names to digests."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def shorten(fingerprint: str | None) -> str:
    """Return the first 12 digits of a fingerprint, for messages."""
    return fingerprint[:12] if fingerprint else "(none)"
