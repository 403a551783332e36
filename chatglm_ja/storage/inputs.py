"""What a step reads: artifacts of other steps, corpora and files, each with its fingerprint.

Opening an artifact checks its files and, through all its ancestors, that each input is still what
it was when it was read. So a model resized for one tokenizer is never trained on data packed with
another.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chatglm_ja.errors import ArtifactError
from chatglm_ja.source_files import FoundFiles, file_format
from chatglm_ja.sources import HUB_NAME, Source
from chatglm_ja.storage import files
from chatglm_ja.storage.files import MANIFEST
from chatglm_ja.storage.manifest import (
    Manifest,
    check_files,
    check_inputs_unchanged,
    fingerprint_of,
    read_manifest,
    shorten,
)

log = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs.github.com/"
NAMED_FILES = 4  # of those that a source passes over


@dataclass(frozen=True)
class Input:
    """An input of a step.

    role                   what it is to the step; of an artifact, the name of the step that made it
    fingerprint            hash of its contents
    lineage                fingerprints of everything it was made from, and its own, by role
    path, manifest         set if it is an artifact
    source_fingerprints    of a corpus: one for each source
    remote_datasets        names of data sets that are loaded from the hub, and not read yet
    """

    role: str
    fingerprint: str
    lineage: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    manifest: Manifest | None = None
    source_fingerprints: tuple[str, ...] = ()
    remote_datasets: tuple[str, ...] = ()

    def read_number(self, group: str, name: str) -> int:
        """Return a number from the manifest's `arguments` or `counts`; ArtifactError if missing."""
        value = getattr(self.manifest, group).get(name)
        if type(value) is not int:
            raise ArtifactError(
                f"{self.path}/{MANIFEST} is damaged: {group} has no number {name}: run "
                f"{self.role}.py --overwrite"
            )
        return value


def open_files(role: str, *paths: Path) -> Input:
    """Fingerprint files that no step wrote, such as a downloaded tokenizer; there may be none.

    Raises ArtifactError for a missing file, and for what git clones in place of a large one.
    """
    for path in paths:
        if not path.is_file():
            raise ArtifactError(f"{role} {path} {files.describe_absence(path)}: check the path")
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ArtifactError(
                    f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
                    f"{path.parent}"
                )
    fingerprint = fingerprint_of({str(i): files.sample_digest(p) for i, p in enumerate(paths)})
    return Input(role, fingerprint, {role: fingerprint})


def open_sources(role: str, sources: Sequence[Source]) -> Input:
    """Fingerprint the files of sources, their formats, and which source each file belongs to.

    Data sets on the hub have no files here; the step's arguments name them. Log lines say what is
    passed over, and which names are taken for folders here.
    """
    fingerprints = []
    for source in sources:
        found = source.find()
        _log_found(source, found)
        formats = [str(file_format(path)) for path in found.files]
        content = open_files(role, *found.files).fingerprint
        fingerprints.append(fingerprint_of({"files": content, "formats": " ".join(formats)}))
    fingerprint = fingerprint_of({str(i): part for i, part in enumerate(fingerprints)})
    remote = tuple(source.path for source in sources if not source.is_local())
    if remote:
        log.info("data sets of the hub: %s", ", ".join(remote))
    return Input(
        role,
        fingerprint,
        {role: fingerprint},
        source_fingerprints=tuple(fingerprints),
        remote_datasets=remote,
    )


def _log_found(source: Source, found: FoundFiles) -> None:
    """Log what is passed over, and a folder here whose name could be one of the hub."""
    path, names = Path(source.path), found.passed_over
    if names or (HUB_NAME.fullmatch(source.path) and path.is_dir()):
        count = f"{len(found.files)} file{'s' * (len(found.files) > 1)} of {path.resolve()}"
        more = ", ..." * (len(names) > NAMED_FILES)
        passed = (
            f"; passed over {len(names)}: {', '.join(names[:NAMED_FILES])}{more}" if names else ""
        )
        log.info("%s: %s%s", source.title, count, passed)


def open_artifact(
    path: Path, script: str, *other_scripts: str, every_byte: bool | None = None
) -> Input:
    """Open a folder that one of the given steps published.

    Raises ArtifactError if it is missing (naming the step to run), damaged, or older than one of
    its inputs. Files over 1 GiB are compared by size only, unless `every_byte` is set.
    """
    manifest = read_manifest(path)
    if manifest is None:
        found = "is not a finished artifact (no manifest)" if path.exists() else "not found"
        raise ArtifactError(f"{path} {found}: run {script} first")
    expected = [Path(name).stem for name in (script, *other_scripts)]
    if manifest.step not in expected:
        raise ArtifactError(
            f"{path} was made by {manifest.step}, expected the output of {' or '.join(expected)}"
        )
    check_files(path, manifest, every_byte)
    check_inputs_unchanged(path, manifest)
    lineage = {**manifest.lineage, manifest.step: manifest.fingerprint}
    return Input(manifest.step, manifest.fingerprint, lineage, path, manifest)


def open_artifact_or_file(path: Path, script: str, every_byte: bool | None = None) -> Input:
    """Open the output folder of a step, given the folder or a file in it, or any other file.

    A file that no step wrote takes the role of the step that would have made it.
    """
    role = Path(script).stem
    if not path.is_file():
        if path.suffix and not path.exists():
            raise ArtifactError(f"{path} not found: expected a file, or the output of {script}")
        return open_artifact(path, script, every_byte=every_byte)
    try:
        manifest = read_manifest(path.parent)
    except ArtifactError:
        manifest = None  # a manifest.json of some other program
    if manifest is not None and manifest.step == role:
        return open_artifact(path.parent, script, every_byte=every_byte)
    return open_files(role, path)


def merge_lineage(inputs: Sequence[Input]) -> dict[str, str]:
    """Return the fingerprints of all ancestors of several inputs, by role.

    Raises ArtifactError if two inputs were made from different versions of an ancestor.
    """
    merged: dict[str, tuple[Input, str]] = {}
    for item in inputs:
        for role, fingerprint in item.lineage.items():
            known_item, known = merged.setdefault(role, (item, fingerprint))
            if known == fingerprint:
                continue
            pair = [(known_item.role, known), (item.role, fingerprint)]
            # If one of the two is the ancestor itself, name it last.
            (first, old), (second, new) = sorted(pair, key=lambda entry: entry[0] == role)
            other = "it is now" if second == role else f"{second} with"
            raise ArtifactError(
                f"{first} was made with {role} {shorten(old)}, but {other} {shorten(new)}: re-run "
                f"the steps after {role} with --overwrite"
            )
    return {role: fingerprint for role, (_, fingerprint) in merged.items()}
