"""The models that step 7 compares and chats with, one for each stage of the pipeline.

A stage is a folder: the base model's own, the others were published by steps 3, 5 and 6. A model is
loaded with the tokenizer of its own folder. This module is imported for `--help`, so it imports
large libraries only when it loads a model.
"""

import datetime
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ja.bases import families
from chatglm_ja.errors import ArtifactError, DataError
from chatglm_ja.storage.files import MANIFEST
from chatglm_ja.storage.inputs import Input, open_artifact
from chatglm_ja.storage.manifest import read_manifest

if TYPE_CHECKING:
    from chatglm_ja.bases.interface import ModelTokenizer

log = logging.getLogger(__name__)

BASE = "base"
# The stages in the order in which the steps make them: name -> the script that publishes the model.
STAGES: dict[str, str | None] = {
    BASE: None,
    "resized": "step3_resize_model.py",
    "pretrained": "step5_train_pt.py",
    "sft": "step6_train_sft.py",
}
# What each stage has behind it, in words.
DESCRIPTIONS = {
    BASE: "as published",
    "resized": "new pieces added, untrained",
    "pretrained": "after continued pretraining",
    "sft": "after fine-tuning",
}
UNTRAINED = (BASE, "resized")  # stages whose model has not been trained by this pipeline
LAST_STAGE = list(STAGES)[-1]
LATEST = "latest"  # of --stage: the last stage whose model exists


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model of transformers in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: "ModelTokenizer"

    @property
    def window(self) -> int:
        """The longest input in tokens."""
        return int(self.model.config.max_position_embeddings)


@dataclass(frozen=True)
class Stage:
    """A name of STAGES and the folder with its model."""

    name: str
    folder: Path

    @property
    def title(self) -> str:
        """The name, with what the stage has behind it."""
        return f"{self.name}: {DESCRIPTIONS[self.name]}"

    def open(self, every_byte: bool | None = None, merged: Path | None = None) -> list[Input]:
        """Check that the folder is complete. Raises ArtifactError, naming the step to run.

        `merged` is step 2's output, if it is an input beside this one; see `open_base_model`.
        """
        script = STAGES[self.name]
        if script is None:
            return families.open_base_model(self.folder, merged)
        return [open_artifact(self.folder, script, every_byte=every_byte)]

    def exists(self) -> bool:
        """Return whether the folder holds a model, complete or not."""
        if self.name == BASE:
            return (self.folder / "config.json").is_file()
        return read_manifest(self.folder) is not None

    def describe(self) -> dict[str, str]:
        """Return the `name` of the model, by its folder, and the `date` of its publication."""
        published = (self.folder / MANIFEST).stat().st_mtime
        return {
            "name": "/".join(self.folder.resolve().parts[-2:]),
            "date": datetime.date.fromtimestamp(published).isoformat(),
        }

    def load(self) -> LoadedModel:
        """Load the model and its tokenizer, on the GPU if there is one.

        Raises DataError if the model has fewer embedding rows than the tokenizer has ids, or does
        not fit the GPU's free memory.
        """
        import torch

        from chatglm_ja.bases.loading import compute_dtype

        try:
            if self.name == BASE:
                base = families.open_base(self.folder)
                model = base.load(compute_dtype())
                loaded = _make(model, base.tokenizer)
            else:
                loaded = load_model(self.folder)
        except torch.OutOfMemoryError:
            raise DataError(
                f"{self.folder} does not fit the GPU's free memory: end the other programs that "
                "use it, or set CUDA_VISIBLE_DEVICES= to use the CPU"
            ) from None
        rows, ids = loaded.model.config.vocab_size, loaded.tokenizer.size
        if rows < ids:
            raise DataError(
                f"{self.folder}: the model has {rows:,} embedding rows, but its tokenizer has "
                f"{ids:,} ids: they do not belong together, re-run the step that made the folder"
            )
        return loaded


def finished_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages whose models exist. Raises ArtifactError if none does."""
    finished = [stage for stage in stages if stage.exists()]
    if not finished:
        raise ArtifactError(
            f"no model found, neither {stages[0].folder} nor a later stage: run the steps first"
        )
    return finished


def compared_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages to evaluate: all, or without one whose step was left out.

    Without texts there is no stage of step 5, without conversations none of step 6. If neither
    exists, or an earlier one does not, opening the stages says which step to run.
    """
    trained = [stage for stage in stages if stage.name not in UNTRAINED]
    missing = [stage for stage in trained if not stage.exists()]
    if len(missing) == len(trained):
        return list(stages)
    for stage in missing:
        log.info(
            "without the stage %s: %s not found, %s makes it", stage.name, stage.folder,
            STAGES[stage.name],
        )  # fmt: skip
    return [stage for stage in stages if stage not in missing]


def find_stage(stages: Sequence[Stage], name: str) -> Stage:
    """Return the stage of a name, or the last one for LATEST. Raises ArtifactError if missing."""
    if name == LATEST:
        return stages[-1]
    named = {stage.name: stage for stage in stages}
    if name not in named:
        raise ArtifactError(
            f"there is no model of the stage {name} yet: expected one of {', '.join(named)}"
        )
    return named[name]


def load_model(folder: Path) -> LoadedModel:
    """Load the model and the tokenizer of a folder that step 3, 5 or 6 published."""
    from chatglm_ja.bases import loading

    tokenizer = families.load_tokenizer(folder)
    model = loading.load_model(folder, loading.compute_dtype())
    return _make(model, tokenizer)


def _make(model: Any, tokenizer: "ModelTokenizer") -> LoadedModel:
    """Put a model on the device, without settings that would change how answers are generated."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    return LoadedModel(model.to(choose_device()).eval(), tokenizer)


def choose_device() -> str:
    """Return the device that models are loaded on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
