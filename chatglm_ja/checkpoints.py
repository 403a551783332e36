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
with a word about what is wrong, and nothing of it is loaded. It is renamed, and removed when there
is a new one.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatglm_ja import files, space
from chatglm_ja.errors import ArtifactError
from chatglm_ja.files import MANIFEST

log = logging.getLogger(__name__)

PREFIX = "step-"
DAMAGED = "damaged-"


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
                # Kept until there is a new one, and not taken for one.
                path.rename(_free_name(path.with_name(DAMAGED + path.name)))
            else:
                return path
        return None

    @contextmanager
    def write(self, step: int, needed: int = 0) -> Iterator[Path | None]:
        """Give a folder to write a checkpoint into; it is there when the block ends.

        None where the disk has less than `needed` bytes: a run of days goes on, with a warning, and
        the next checkpoint may find room.
        """
        final = self.folder / f"{PREFIX}{step:06d}"
        working = self.folder / f".{final.name}.writing"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(working, ignore_errors=True)
        free = space.free_bytes(self.folder)
        if free < needed:
            log.warning(
                "no checkpoint at step %d: %s takes %s, but its disk has %s free: free some",
                step,
                final,
                space.text(needed),
                space.text(free),
            )
            yield None
            return
        working.mkdir()
        try:
            yield working
            records = {path.name: files.record(path) for path in sorted(working.iterdir())}
            manifest = json.dumps({"run": self.run, "step": step, "files": records}, indent=1)
            (working / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
            files.sync(working / MANIFEST)
            files.sync(working)
            shutil.rmtree(final, ignore_errors=True)
            working.rename(final)
            files.sync(self.folder)
        finally:
            shutil.rmtree(working, ignore_errors=True)
        for old in [*self._newest_first()[self.keep :], *self.folder.glob(f"{DAMAGED}*")]:
            shutil.rmtree(old)

    def how_to_go_on(self) -> str:
        """What a run that ends now is told about the next one."""
        for path in self._newest_first():
            if (path / MANIFEST).is_file():
                return f"the same command goes on from step {step_of(path)}"
        return "no checkpoint is there to go on from: the same command starts anew"

    def _newest_first(self) -> list[Path]:
        found = [
            path
            for path in self.folder.glob(f"{PREFIX}*")
            if path.is_dir() and path.name.removeprefix(PREFIX).isdecimal()
        ]
        return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(path.name.removeprefix(PREFIX))


def _free_name(path: Path) -> Path:
    """The path, or with a number behind it if there is something already."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a checkpoint, and what is wrong with it ("" for nothing)."""
    try:
        manifest = files.read_json(path / MANIFEST)
    except FileNotFoundError:
        return None, "it has no manifest"
    except (OSError, ValueError):
        manifest = None
    if (
        not isinstance(manifest, dict)
        or not isinstance(manifest.get("run"), dict)
        or not files.are_records(manifest.get("files"))
    ):
        return None, "its manifest is damaged"
    try:
        return manifest, files.problem(path, manifest["files"], every_byte=True)
    except ArtifactError as error:
        return None, str(error)


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first setting in which two runs differ."""
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            return f"with {name}={theirs.get(name)}, not {ours.get(name)}"
    return "like this one"
