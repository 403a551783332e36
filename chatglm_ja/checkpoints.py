"""Checkpoints of a training run: written whole, kept few, opened only if every byte is right.

    step5_pt.checkpoints/               beside the output folder, removed when that is published
      step-000200/
        weights.safetensors             what is trained, float32
        optimizer.safetensors           Adam's moments of it
        random.safetensors              states of the random generators, of every process
        trainer_state.json              the Trainer's counters and log
        progress.json                   schedule, optimizer step, sums since the last log line
        manifest.json                   SHA-256 of the files, and which run they belong to

A checkpoint is written under another name, synced, and renamed. It does not depend on how many
processes share the run. The newest one that is whole is resumed from; a damaged one is passed over
with a word about what is wrong, and nothing of it is loaded.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatglm_ja.artifacts import hash_file, record_file, sync
from chatglm_ja.errors import ArtifactError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = "step-"


class Checkpoints:
    """The checkpoints of one run in a folder.

    `run` is what makes a run this run: settings, data, model. Two checkpoints of different runs do
    not lie in a folder together. The last `keep` are kept.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], keep: int) -> None:
        self.folder = folder
        self.run = json.loads(json.dumps(run, default=str))
        self.keep = keep

    def start(self, overwrite: bool) -> Path | None:
        """The newest whole checkpoint of this run, or None; says why others were passed over.

        Raises ArtifactError for checkpoints of another run, which `overwrite` removes.
        """
        for path in self._newest_first():
            manifest, problem = _read(path)
            if manifest is not None and manifest["run"] != self.run:
                difference = _difference(manifest["run"], self.run)
                if not overwrite:
                    raise ArtifactError(
                        f"{self.folder} holds checkpoints of a run {difference}: ask for that run "
                        "to go on with it, or pass --overwrite to start anew"
                    )
                log.info("removing %s: of a run %s", path, difference)
                shutil.rmtree(path)
            elif problem:
                log.warning("passing over %s: %s", path, problem)
            else:
                return path
        return None

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Give a folder to write a checkpoint into; it is there when the block ends."""
        final = self.folder / f"{PREFIX}{step:06d}"
        working = self.folder / f".{final.name}.writing"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        try:
            yield working
            files = {path.name: record_file(path) for path in sorted(working.iterdir())}
            manifest = json.dumps({"run": self.run, "step": step, "files": files}, indent=1)
            (working / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
            sync(working / MANIFEST)
            # A damaged one of this step was passed over when the run was resumed.
            shutil.rmtree(final, ignore_errors=True)
            working.rename(final)
            sync(self.folder)
        finally:
            shutil.rmtree(working, ignore_errors=True)
        for old in self._newest_first()[self.keep :]:
            shutil.rmtree(old)

    def remove(self) -> None:
        """Remove all of them: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*"), reverse=True)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(path.name.removeprefix(PREFIX))


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a checkpoint, and what is wrong with it ("" for nothing)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        run, files = manifest["run"], manifest["files"]
        recorded = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        run.items()
    except FileNotFoundError:
        return None, "it has no manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, "its manifest is damaged"
    for name, (size, digest) in recorded.items():
        file = path / Path(name).name
        if not file.is_file():
            return manifest, f"{name} is missing"
        if file.stat().st_size != size:
            return manifest, f"{name} has {file.stat().st_size} bytes, expected {size}"
        if hash_file(file) != digest:
            return manifest, f"{name} does not have the SHA-256 of its manifest"
    return manifest, ""


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting in which two runs differ."""
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            return f"with {name}={theirs.get(name)}, not {ours.get(name)}"
    return "like this one"
