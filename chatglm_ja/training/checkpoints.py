"""Checkpoints of a training run: published atomically, pruned to a few, verified on opening.

    step5_pt.checkpoints/               beside the output folder, removed when that is published
      step-000200/
        weights.safetensors             trained weights, float32
        optimizer.safetensors           Adam's moments
        random.safetensors              states of the random generators of every process
        trainer_state.json              the Trainer's counters and log
        progress.json                   schedule, optimizer step, sums since the last log line
        manifest.json                   SHA-256 of the files, and the run they belong to

A checkpoint does not depend on the number of processes. A run resumes from the newest intact one.
A damaged one is skipped with a warning that says what is wrong; nothing of it is loaded. It is
renamed, and removed once there is a newer checkpoint.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from chatglm_ja.errors import ArtifactError
from chatglm_ja.storage import disk, files
from chatglm_ja.storage.files import MANIFEST, FileRecord

log = logging.getLogger(__name__)

FOLDER_PREFIX = "step-"
DAMAGED = "damaged-"


class CheckpointManifest(BaseModel):
    """The manifest of a checkpoint; `run` identifies the run it belongs to."""

    model_config = ConfigDict(strict=True)

    run: dict[str, Any]
    step: int
    files: dict[str, FileRecord]


class Checkpoints:
    """The checkpoints of one run in a folder, of which the last `keep` are kept.

    `run` identifies the run: settings, data, model. Checkpoints of two runs never share a folder.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], keep: int) -> None:
        self.folder = folder
        self.run = json.loads(json.dumps(run, default=str))
        self.keep = keep

    def find_newest(self, overwrite: bool) -> Path | None:
        """Return the newest intact checkpoint of this run, or None; warn about damaged ones.

        Raises ArtifactError for checkpoints of another run; `overwrite` removes them instead.
        """
        for path in self._newest_first():
            manifest, problem = _read(path)
            if manifest is not None and manifest.run != self.run:
                difference = _describe_difference(manifest.run, self.run)
                if not overwrite:
                    raise ArtifactError(
                        f"{self.folder} holds checkpoints of a run {difference}: use that run's "
                        "settings to resume it, or pass --overwrite to start again"
                    )
                log.info("removing %s: it belongs to a run %s", path, difference)
                shutil.rmtree(path)
            elif problem:
                log.warning("skipping the checkpoint %s: %s", path, problem)
                path.rename(_free_name(path.with_name(DAMAGED + path.name)))
            else:
                return path
        return None

    @contextmanager
    def write(self, step: int, needed: int = 0) -> Iterator[Path | None]:
        """Yield a folder to write a checkpoint into; publish it when the block ends.

        Yields None if the disk has less than `needed` bytes free: the run continues with a warning,
        and the next checkpoint may find space.
        """
        final = self.folder / f"{FOLDER_PREFIX}{step:06d}"
        working = self.folder / f".{final.name}.writing"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(working, ignore_errors=True)
        free = disk.free_bytes(self.folder)
        if free < needed:
            log.warning(
                "no checkpoint at step %d: %s takes %s, but its disk has %s free: free some",
                step,
                final,
                disk.format_bytes(needed),
                disk.format_bytes(free),
            )
            yield None
            return
        working.mkdir()
        try:
            yield working
            records = {path.name: files.record_file(path) for path in sorted(working.iterdir())}
            manifest = CheckpointManifest(run=self.run, step=step, files=records)
            files.write_json(working / MANIFEST, manifest.model_dump())
            files.publish_folder(working, final)
        finally:
            shutil.rmtree(working, ignore_errors=True)
        for old in [*self._newest_first()[self.keep :], *self.folder.glob(f"{DAMAGED}*")]:
            shutil.rmtree(old)

    def describe_resume(self) -> str:
        """Tell the user of a run that ends now how to resume it."""
        for path in self._newest_first():
            if (path / MANIFEST).is_file():
                return f"re-run the command to resume from step {step_of(path)}"
        return "there is no checkpoint yet: re-running the command starts again"

    def _newest_first(self) -> list[Path]:
        paths = [
            path
            for path in self.folder.glob(f"{FOLDER_PREFIX}*")
            if path.is_dir() and path.name.removeprefix(FOLDER_PREFIX).isdecimal()
        ]
        return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(path.name.removeprefix(FOLDER_PREFIX))


def _free_name(path: Path) -> Path:
    """Return the path, with a number appended if something is there already."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _read(path: Path) -> tuple[CheckpointManifest | None, str | None]:
    """Return the manifest of a checkpoint, and what is wrong with the checkpoint, if anything."""
    try:
        manifest = CheckpointManifest.model_validate(files.read_json(path / MANIFEST))
        return manifest, files.find_problem(path, manifest.files, every_byte=True)
    except FileNotFoundError:
        return None, "it has no manifest"
    except ArtifactError as error:
        return None, str(error)
    except (OSError, ValueError, ValidationError):
        return None, "its manifest is damaged"


def _describe_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Name the first setting in which two runs differ."""
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            return f"with {name}={theirs.get(name)}, not {ours.get(name)}"
    return "like this one"
