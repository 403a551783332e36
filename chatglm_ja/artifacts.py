"""How the steps hand folders to each other: published whole, opened checked, never mixed up.

A step's output folder appears under its final name only when it is complete:

    artifacts/demo/.step4_data.lock              held while a process writes
    artifacts/demo/.step4_data.writing/          files are written and synced here
    artifacts/demo/step4_data/                   ... then renamed here, with manifest.json
    artifacts/demo/step4_data.work/              what a run that is killed goes on with

The manifest holds the step's arguments, counts and versions, the size and SHA-256 of every file,
and the fingerprint of every input. A fingerprint depends on contents only, so a step that is
run again on the same inputs leaves what depends on it valid. Opening an artifact checks its files
and, through all its ancestors, that each input is still what it was when it was read: a model
resized for one tokenizer cannot meet data packed with another.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from chatglm_ja import files, space
from chatglm_ja.errors import ArtifactError
from chatglm_ja.files import MANIFEST
from chatglm_ja.settings import StepConfig
from chatglm_ja.sources import Source

log = logging.getLogger(__name__)

MANIFEST_KEYS = {"step", "fingerprint", "arguments", "counts", "inputs", "lineage", "files"}
PACKAGES = (
    "torch", "transformers", "tokenizers", "sentencepiece", "peft", "deepspeed", "datasets",
    "accelerate", "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """What a step reads, with the hash of its contents; `path` is set if it is an artifact.

    `lineage` maps the role of everything it was made from, and its own, to a fingerprint.
    """

    role: str
    fingerprint: str
    path: Path | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()  # data sets that are loaded by name, which nobody has read yet

    def number(self, group: str, name: str) -> int:
        """A number among the manifest's `arguments` or `counts`. ArtifactError if it has none."""
        value = self.manifest[group].get(name)
        if type(value) is not int:
            raise ArtifactError(
                f"{self.path}/{MANIFEST} is damaged: {group} has no number {name}: run "
                f"{self.role}.py --overwrite"
            )
        return value


def open_file_input(role: str, *paths: Path) -> Input:
    """Fingerprint files that no step made: a corpus, a downloaded tokenizer.

    There may be none: data sets that are loaded by name count by the settings that name them.
    """
    for path in paths:
        if not path.is_file():
            found = "is a folder, expected a file" if path.is_dir() else "not found: check the path"
            raise ArtifactError(f"{role} {path} {found}")
    fingerprint = _fingerprint({str(i): files.sample_digest(path) for i, path in enumerate(paths)})
    return Input(role, fingerprint, lineage={role: fingerprint})


def open_sources(role: str, sources: Sequence[Source]) -> Input:
    """Fingerprint the files of sources: which source a file belongs to, and its format, count too.

    `parts` of the result are the fingerprints of the single sources.
    """
    parts = []
    for source in sources:
        paths = source.files()
        opened = open_file_input(role, *paths)
        formats = [path.name.removesuffix(".gz").rpartition(".")[2] for path in paths]
        parts.append(_fingerprint({"files": opened.fingerprint, "formats": " ".join(formats)}))
    fingerprint = _fingerprint({str(i): part for i, part in enumerate(parts)})
    by_name = tuple(source.path for source in sources if not source.is_local())
    return Input(
        role, fingerprint, lineage={role: fingerprint}, parts=tuple(parts), by_name=by_name
    )


def open_base_tokenizer(folder: Path) -> Input:
    """Fingerprint the tokenizer of a ChatGLM3 folder, whose config.json is read as well."""
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            f"base model {folder} has no config.json: download ChatGLM3-6B there and set "
            "CHATGLM3_6B_DIR, or for the demo run demo/build_base_model.py"
        )
    return open_file_input("base_tokenizer", folder / "tokenizer.model")


def open_base_model(folder: Path) -> list[Input]:
    """Fingerprint a ChatGLM3 folder: its tokenizer, and its configuration and weights."""
    base_tokenizer = open_base_tokenizer(folder)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    weights = weights or [*folder.glob("*.bin"), *folder.glob("*.bin.index.json")]
    weights.sort()
    return [base_tokenizer, open_file_input("base_model", folder / "config.json", *weights)]


def open_artifact(path: Path, made_by: str, *or_by: str, every_byte: bool | None = None) -> Input:
    """Open a folder that a step published; its role is the name of that step.

    Raises ArtifactError when it is missing (naming the step to run), damaged, or when one of
    the inputs that it was made from has changed since. Files of more than 1 GiB are compared by
    size only, unless `every_byte` is asked for.
    """
    manifest = read_manifest(path)
    if manifest is None:
        found = "is not a finished artifact (no manifest)" if path.exists() else "not found"
        raise ArtifactError(f"{path} {found}: run {made_by} first")
    role = manifest["step"]
    expected = [Path(script).stem for script in (made_by, *or_by)]
    if role not in expected:
        raise ArtifactError(
            f"{path} was made by {role}, expected the output of {' or '.join(expected)}"
        )
    _check_files(path, manifest, every_byte)
    _check_inputs_unchanged(path, manifest)
    lineage = {**manifest["lineage"], role: manifest["fingerprint"]}
    return Input(role, manifest["fingerprint"], path, lineage, manifest)


def open_artifact_or_file(path: Path, made_by: str, every_byte: bool | None = None) -> Input:
    """Open a folder that a step published, named by itself or by a file in it; or any other file.

    A file from elsewhere takes the role of the step that would have made it.
    """
    role = Path(made_by).stem
    if not path.is_file():
        if path.suffix and not path.exists():
            raise ArtifactError(f"{path} not found: expected a file, or the output of {made_by}")
        return open_artifact(path, made_by, every_byte=every_byte)
    try:
        manifest = read_manifest(path.parent)
    except ArtifactError:
        manifest = None  # somebody else's manifest.json
    if manifest and manifest["step"] == role:
        return open_artifact(path.parent, made_by, every_byte=every_byte)
    return open_file_input(role, path)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of an artifact folder, or None where there is none."""
    try:
        manifest = files.read_json(path / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        manifest = None
    if not _is_manifest(manifest):
        raise ArtifactError(
            f"{path / MANIFEST} is damaged: remove {path} and run the step that makes it again"
        )
    return manifest


def _is_manifest(value: Any) -> bool:
    """Whether this is what `Output` writes, by type."""
    if not isinstance(value, dict) or not value.keys() >= MANIFEST_KEYS:
        return False
    inputs, lineage = value["inputs"], value["lineage"]
    return (
        all(isinstance(value[name], str) for name in ("step", "fingerprint"))
        and all(
            isinstance(value[name], dict) for name in ("arguments", "counts", "inputs", "lineage")
        )
        and files.are_records(value["files"])
        and all(isinstance(fingerprint, str) for fingerprint in lineage.values())
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("path", 0), str | None)
            and isinstance(entry.get("fingerprint"), str)
            for entry in inputs.values()
        )
    )


class Output:
    """A step's output folder: decides whether there is work to do, and publishes the result.

    output = Output(config, "step1_train_tokenizer", inputs)
    if output.is_settled(needed=2**20):
        return
    with output.write() as folder:
        ...                          # an exception or a kill leaves no output folder
        output.counts["pieces"] = 20000

    `unfinished` is the suffix of a folder beside, `output.unfinished`, in which a step keeps what
    a run that was killed goes on with. It is removed when the result is published.
    """

    def __init__(
        self, config: StepConfig, step: str, inputs: list[Input], unfinished: str = "unfinished"
    ) -> None:
        self.config = config
        # A link names a folder elsewhere; what is published is renamed on that disk.
        linked = config.output_dir.is_symlink()
        self.path = config.output_dir.resolve() if linked else config.output_dir
        self.step = step
        self.arguments = json.loads(json.dumps(config.arguments(), default=str))
        self.inputs = inputs
        self.lineage = merge_lineage(inputs)
        for source in inputs:
            resolved = self.path.resolve()
            if source.path and source.path.resolve() in (resolved, *resolved.parents):
                raise ArtifactError(f"--output-dir {self.path} lies in the input {source.path}")
        self.unfinished = self.path.with_name(f"{self.path.name}.{unfinished}")
        self.counts: dict[str, Any] = {}
        self._seen: str | None = None  # fingerprint of the result that `is_settled` found

    def is_settled(self, needed: int = 0) -> bool:
        """True when there is nothing to do: the folder holds this very result already, or only
        a check of settings and inputs was asked for. Says which.

        `needed` is about how many bytes the work will take on the disk. Raises ArtifactError when
        it has less, and when the folder holds a result of other inputs or arguments and may not
        be overwritten: nothing that took hours is replaced unasked.
        """
        if self._beside("old").exists() and not self.path.exists():
            with self._only_writer():
                self._restore_interrupted_swap()
        manifest = read_manifest(self.path)
        self._seen = manifest["fingerprint"] if manifest else None
        if manifest is None:
            is_foreign_folder = self.path.is_dir() and any(self.path.iterdir())
            if is_foreign_folder or (self.path.exists() and not self.path.is_dir()):
                raise ArtifactError(
                    f"{self.path} exists and no step made it: move it away or choose another "
                    "--output-dir"
                )
        elif manifest["step"] != self.step:
            raise ArtifactError(
                f"{self.path} is the output of {manifest['step']}, not {self.step}: choose "
                "another --output-dir"
            )
        elif not self.config.overwrite:
            self._compare(manifest)
            self._remove_leftover()
            log.info("%s is finished already; --overwrite makes it again", self.path)
            return True
        space.require(self.path, needed - space.total_bytes(self.unfinished))
        if self.config.check:
            unseen = dict.fromkeys(name for source in self.inputs for name in source.by_name)
            aside = f" (not looked at: {', '.join(unseen)}, data sets by name)" if unseen else ""
            log.info("settings and inputs are good: %s can be made%s", self.path, aside)
        return self.config.check

    def _compare(self, manifest: Mapping[str, Any]) -> None:
        """Refuse a finished result that differs from what was asked for now."""
        cure = "pass --overwrite to make it again"
        recorded = {role: entry["fingerprint"] for role, entry in manifest["inputs"].items()}
        current = {source.role: source.fingerprint for source in self.inputs}
        for role in sorted(recorded | current):
            if recorded.get(role) != current.get(role):
                raise ArtifactError(
                    f"{self.path} was made with {role} {short(recorded.get(role))}, which is now "
                    f"{short(current.get(role))}: {cure}"
                )
        for name in sorted(manifest["arguments"] | self.arguments):
            before, now = manifest["arguments"].get(name), self.arguments.get(name)
            if before != now:
                raise ArtifactError(f"{self.path} was made with {name}={before}, not {now}: {cure}")
        _check_files(self.path, manifest, self.config.verify)

    @contextmanager
    def write(self) -> Iterator[Path]:
        """Give a folder to write into; publish it when the block ends without an exception."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._only_writer():
            manifest = read_manifest(self.path)
            if manifest and manifest["fingerprint"] != self._seen:
                raise ArtifactError(
                    f"another process has published {self.path} meanwhile: run this again to see "
                    "whether it is the same"
                )
            working = self._beside("writing")
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir()
            try:
                yield working
                self._publish(working)
            except SafetensorError as error:  # safetensors' word for a full disk, too
                raise ArtifactError(
                    f"{self.path} could not be written ({error}): if the disk is full, free "
                    "some of it; the same command goes on from what is finished"
                ) from error
            finally:
                shutil.rmtree(working, ignore_errors=True)
            self._remove_unfinished()

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Hold a lock that the system releases when this process ends, however it ends."""
        path = self._beside("lock")
        with open(path, "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The last holder may have removed the file between opening and locking it.
                free = path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino
            except BlockingIOError:
                free = False
            if not free:
                raise ArtifactError(
                    f"another process is writing {self.path}: wait for it, or stop it"
                )
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def describe(self) -> dict[str, Any]:
        """What the manifest says besides the files."""
        return {
            "step": self.step,
            "arguments": self.arguments,
            "counts": self.counts,
            "inputs": {
                source.role: {
                    "path": source.path and os.path.relpath(source.path, self.path),
                    "fingerprint": source.fingerprint,
                }
                for source in self.inputs
            },
            "lineage": dict(self.lineage),
            "versions": versions(),
        }

    def _publish(self, working: Path) -> None:
        written = sorted(path for path in working.rglob("*") if path.is_file())
        records = {path.relative_to(working).as_posix(): files.record(path) for path in written}
        fingerprint = _fingerprint({name: entry["sha256"] for name, entry in records.items()})
        manifest = {**self.describe(), "fingerprint": fingerprint, "files": records}
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (working / MANIFEST).write_text(text + "\n", encoding="utf-8")
        for path in (working / MANIFEST, working, *{path.parent for path in written}):
            files.sync(path)
        old = self._beside("old")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        working.rename(self.path)
        files.sync(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _restore_interrupted_swap(self) -> None:
        """A kill between the two renames of `_publish` left the former result under `.old`."""
        old = self._beside("old")
        if old.exists() and not self.path.exists():
            old.rename(self.path)

    def _remove_leftover(self) -> None:
        """The work of the run that made this result, if a kill left it. What is newer is that of a
        run which is to make it again, and stays."""
        if self.config.check or not self.unfinished.exists():
            return
        paths = [self.unfinished, *self.unfinished.rglob("*")]
        newest = max(path.lstat().st_mtime for path in paths)
        if newest > (self.path / MANIFEST).stat().st_mtime:
            log.info("%s is of a run with --overwrite, which goes on from it", self.unfinished)
            return
        with self._only_writer():
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Under another name: what is half removed when this is killed is not gone on with."""
        removed = self._beside("removed")
        shutil.rmtree(removed, ignore_errors=True)
        if self.unfinished.exists():
            self.unfinished.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _beside(self, state: str) -> Path:
        return self.path.parent / f".{self.path.name}.{state}"


def merge_lineage(inputs: list[Input]) -> dict[str, str]:
    """The fingerprints of all ancestors of several inputs; an ancestor they disagree on is an
    ArtifactError, since then they do not belong together."""
    merged: dict[str, tuple[Input, str]] = {}
    for source in inputs:
        for role, fingerprint in source.lineage.items():
            known_from, known = merged.setdefault(role, (source, fingerprint))
            if known == fingerprint:
                continue
            pair = [(known_from.role, known), (source.role, fingerprint)]
            # The input itself, if it is one of the two, is what the other should have been made of.
            (first, old), (second, new) = sorted(pair, key=lambda entry: entry[0] == role)
            other = "it is now" if second == role else f"{second} with"
            raise ArtifactError(
                f"{first} was made with {role} {short(old)}, but {other} {short(new)}: run the "
                f"steps after {role} again with --overwrite"
            )
    return {role: fingerprint for role, (_, fingerprint) in merged.items()}


def versions() -> dict[str, str]:
    """The installed versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def history(path: Path) -> dict[str, dict[str, Any]]:
    """The manifests of an artifact folder and of all that it was made from, by step, in order."""
    manifest = read_manifest(path)
    if manifest is None:
        return {}
    manifests: dict[str, dict[str, Any]] = {}
    for entry in manifest["inputs"].values():
        if entry["path"] is not None:
            manifests |= history(Path(os.path.normpath(path / entry["path"])))
    return dict(sorted((manifests | {manifest["step"]: manifest}).items()))


def short(fingerprint: str | None) -> str:
    """The first 12 digits of a fingerprint, for messages."""
    return fingerprint[:12] if fingerprint else "(none)"


def _check_inputs_unchanged(
    path: Path, manifest: Mapping[str, Any], made_of_it: tuple[Path, ...] = ()
) -> None:
    """Compare each recorded input that is itself an artifact with what lies there now.

    `made_of_it` are the folders that were come from.
    """
    if path in made_of_it:
        raise ArtifactError(f"{path} is recorded as made from itself: make it again")
    for role, entry in manifest["inputs"].items():
        if entry["path"] is None:
            continue  # no artifact: the step that reads it compares
        source = Path(os.path.normpath(path / entry["path"]))
        current = read_manifest(source)
        if current is None:
            continue
        if current["fingerprint"] != entry["fingerprint"]:
            raise ArtifactError(
                f"{path} was made from {role} {short(entry['fingerprint'])}, but {source}"
                f" is now {short(current['fingerprint'])}: run {manifest['step']}.py --overwrite"
            )
        _check_inputs_unchanged(source, current, (*made_of_it, path))


def _check_files(path: Path, manifest: Mapping[str, Any], every_byte: bool | None) -> None:
    problem = files.problem(path, manifest["files"], bool(every_byte))
    if problem:
        raise ArtifactError(f"{path}: {problem}: run {manifest['step']}.py --overwrite")


def _fingerprint(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
