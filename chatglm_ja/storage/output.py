"""A step's output folder, which appears under its final name only when it is complete:

artifacts/demo/.step4_data.lock       locked while a process writes
artifacts/demo/.step4_data.writing/   files are written and flushed here
artifacts/demo/step4_data/            ... then renamed here, with manifest.json
artifacts/demo/step4_data.work/       finished parts, from which a killed run resumes
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from chatglm_ja import settings_file
from chatglm_ja.errors import ArtifactError
from chatglm_ja.settings import StepConfig
from chatglm_ja.storage import disk, files
from chatglm_ja.storage.files import MANIFEST, FileRecord
from chatglm_ja.storage.inputs import Input, merge_lineage
from chatglm_ja.storage.manifest import (
    InputRecord,
    Manifest,
    check_files,
    fingerprint_of,
    read_manifest,
    read_versions,
    shorten,
)

log = logging.getLogger(__name__)


class Output:
    """The output folder of one run of a step.

        output = Output(config, "step1_train_tokenizer", inputs)
        if not output.prepare():
            return
        with output.write() as folder:
            ...                          # an exception or a kill publishes nothing
            output.counts["pieces"] = 20000

    `records` may be given those of files that were hashed while they were written: publication
    hashes all others.

    `unfinished` is the suffix of `output.unfinished`, a folder beside the output in which a step
    keeps finished parts; a killed run resumes from it. It is removed on publication.
    """

    def __init__(
        self, config: StepConfig, step: str, inputs: Sequence[Input], unfinished: str = "unfinished"
    ) -> None:
        self.config = config
        chosen = config.output_dir
        resolved = Path(os.path.realpath(chosen))
        if chosen.parts[:1] == ("~",):
            raise ArtifactError(
                f"--output-dir {chosen}: the shell has not replaced the ~: write the path in full"
            )
        if not files.is_utf8(chosen):
            raise ArtifactError(
                f"--output-dir {chosen} is not valid UTF-8, in which model files cannot be "
                "written: choose another name, or a relative path"
            )
        if Path.cwd().is_relative_to(resolved):
            raise ArtifactError(
                f"--output-dir {chosen} holds the current folder, so it cannot be replaced: name a "
                f"new folder, such as {chosen / step}"
            )
        # Follow a link, so that the final rename stays on the disk it points to.
        self.path = resolved if chosen.is_symlink() or chosen.name == ".." else chosen
        self.step = step
        self.arguments: dict[str, Any] = json.loads(json.dumps(config.arguments(), default=str))
        self.inputs = inputs
        self.lineage = merge_lineage(inputs)
        for item in inputs:
            if item.path and item.path.resolve() in (resolved, *resolved.parents):
                raise ArtifactError(f"--output-dir {self.path} lies in the input {item.path}")
        self.unfinished = self.path.with_name(f"{self.path.name}.{unfinished}")
        self.counts: dict[str, Any] = {}
        self.records: dict[str, FileRecord] = {}
        self._found_fingerprint: str | None = None  # of what `prepare` found in the folder

    def prepare(self) -> bool:
        """Return True if there is work to do; False if the result exists already, or for --check.

        Raises ArtifactError if the folder cannot be written, if the disk has too little space, and
        if the folder holds anything else: a result is replaced only with --overwrite.
        """
        with self._explaining_errors():
            if files.replaced_path(self.path).exists() and not self.path.exists():
                with self._lock():
                    files.restore_replaced(self.path)
            manifest = read_manifest(self.path)
            is_folder = self.path.is_dir()
            is_free = not any(self.path.iterdir()) if is_folder else not self.path.exists()
        self._found_fingerprint = manifest.fingerprint if manifest else None
        if manifest is None:
            if not is_free:
                raise ArtifactError(
                    f"{self.path} exists and no step made it: move it away or choose another "
                    "--output-dir"
                )
        elif manifest.step != self.step:
            raise ArtifactError(
                f"{self.path} is the output of {manifest.step}, not {self.step}: choose another "
                "--output-dir"
            )
        elif not self.config.overwrite:
            self._check_same(manifest)
            self._remove_leftovers()
            log.info("%s is finished already; pass --overwrite to make it again", self.path)
            return False
        self._try_to_write()
        self.require_disk_space()
        if self.config.check:
            names = dict.fromkeys(name for item in self.inputs for name in item.remote_datasets)
            aside = f" (not checked: {', '.join(names)}, data sets on the hub)" if names else ""
            log.info("settings and inputs are good: %s can be made%s", self.path, aside)
        return not self.config.check

    def require_disk_space(self) -> None:
        """Raise ArtifactError if the disk has too little space for the result."""
        needed = self.config.disk_bytes() - disk.folder_bytes(self.unfinished)
        disk.require_free(self.path, needed)

    @contextmanager
    def write(self) -> Iterator[Path]:
        """Yield a folder to write into; publish it when the block ends without an exception."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            manifest = read_manifest(self.path)
            if manifest and manifest.fingerprint != self._found_fingerprint:
                raise ArtifactError(
                    f"another process has published {self.path} meanwhile: re-run the command to "
                    "compare"
                )
            working = self._hidden("writing")
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir()
            try:
                yield working
                self._publish(working)
            except SafetensorError as error:  # raised for a full disk, too
                raise ArtifactError(
                    f"{self.path} could not be written ({error}): if the disk is full, free some "
                    "space; re-run the command to resume"
                ) from error
            finally:
                shutil.rmtree(working, ignore_errors=True)
            self._remove_unfinished()

    def describe(self) -> Manifest:
        """Return the manifest without files and fingerprint."""
        inputs = {
            item.role: InputRecord(
                path=os.path.relpath(item.path, self.path) if item.path else None,
                fingerprint=item.fingerprint,
            )
            for item in self.inputs
        }
        return Manifest(
            step=self.step, arguments=self.arguments, counts=self.counts, inputs=inputs,
            lineage=self.lineage, versions=read_versions(), files={},
        )  # fmt: skip

    def _try_to_write(self) -> None:
        """Raise ArtifactError if the folder cannot be made, or replaced, where it is to be."""
        if os.path.ismount(self.path):
            raise ArtifactError(
                f"{self.path} is a mount point, which cannot be replaced: name a folder in it, "
                f"such as --output-dir {self.path / self.step}"
            )
        with self._explaining_errors():
            parent = disk.existing_parent(self.path.parent)
            Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=parent)).rmdir()

    @contextmanager
    def _explaining_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = Path(error.filename or self.path).parent
            raise ArtifactError(
                f"{self.path} cannot be written: {place}: {error.strerror}: choose another "
                "--output-dir"
            ) from None

    def _publish(self, working: Path) -> None:
        paths = {p.relative_to(working).as_posix(): p for p in working.rglob("*") if p.is_file()}
        records = {
            name: self.records.get(name) or files.record_file(path)
            for name, path in sorted(paths.items())
        }
        fingerprint = fingerprint_of({name: record.sha256 for name, record in records.items()})
        manifest = self.describe().model_copy(update={"fingerprint": fingerprint, "files": records})
        files.write_json(working / MANIFEST, manifest.model_dump(), indent=2)
        # Not among the records: paths and numbers of processes do not change the result.
        settings = settings_file.dump(self.config, self.step)
        (working / settings_file.SETTINGS_FILE).write_text(settings, encoding="utf-8")
        files.publish_folder(working, self.path)

    def _check_same(self, manifest: Manifest) -> None:
        """Raise ArtifactError if a finished result was made from other inputs or arguments."""
        fix = (
            "pass --overwrite to replace it; to keep it, choose another --output-dir, or another "
            "CHATGLM_JA_ARTIFACTS for all steps"
        )
        recorded = {role: entry.fingerprint for role, entry in manifest.inputs.items()}
        current = {item.role: item.fingerprint for item in self.inputs}
        for role in sorted(recorded | current):
            if recorded.get(role) != current.get(role):
                raise ArtifactError(
                    f"{self.path} was made with {role} {shorten(recorded.get(role))}, which is now "
                    f"{shorten(current.get(role))}: {fix}"
                )
        for name in sorted(manifest.arguments | self.arguments):
            before, now = manifest.arguments.get(name), self.arguments.get(name)
            if before != now:
                raise ArtifactError(f"{self.path} was made with {name}={before}, not {now}: {fix}")
        check_files(self.path, manifest, self.config.verify)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold a lock that the system releases when this process ends, however it ends."""
        path = self._hidden("lock")
        with open(path, "w", encoding="utf-8") as lock:
            is_free = files.try_lock(lock)
            # The last holder may have removed the file between opening and locking it.
            if is_free:
                is_free = path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino
            if not is_free:
                raise ArtifactError(
                    f"another process is writing {self.path}: wait for it, or stop it"
                )
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Remove what a run left that was killed just after it had published this result.

        If `unfinished` is newer than the result, it belongs to an interrupted run with --overwrite.
        """
        left = [path for path in (self.unfinished, self._hidden("removed")) if path.exists()]
        if self.config.check or not left:
            return
        if self.unfinished in left:
            newest = max(p.lstat().st_mtime for p in [self.unfinished, *self.unfinished.rglob("*")])
            if newest > (self.path / MANIFEST).stat().st_mtime:
                log.info("keeping %s: an interrupted run with --overwrite resumes from it",
                         self.unfinished)  # fmt: skip
                return
        with self._lock():
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Rename before deleting, so that a crash leaves nothing that looks resumable."""
        removed = self._hidden("removed")
        shutil.rmtree(removed, ignore_errors=True)
        if self.unfinished.exists():
            files.rename_or_remove(self.unfinished, removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _hidden(self, state: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{state}")
