"""The stages of the model that are compared and talked to: base, resized, pretrained, sft.

A stage is a folder: the base's is in ChatGLM3's layout, the others are what steps 3, 5 and 6
published. Each is loaded with the tokenizer that lies in its own folder. The large libraries are
imported when one is loaded: what is there is looked at before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_ja.chatglm3.model_files import open_base_model
from chatglm_ja.errors import ArtifactError, DataError
from chatglm_ja.storage.inputs import Input, open_artifact
from chatglm_ja.storage.manifest import read_manifest

MADE_BY = {
    "resized": "step3_resize_model.py",
    "pretrained": "step5_train_pt.py",
    "sft": "step6_train_sft.py",
}


@dataclass(frozen=True)
class Stage:
    """A name of STAGES and the folder with its model."""

    name: str
    folder: Path

    def open(self, every_byte: bool | None = None) -> list[Input]:
        """Check that the folder is whole. Raises ArtifactError, naming the step to run."""
        if self.name == "base":
            return open_base_model(self.folder)
        return [open_artifact(self.folder, MADE_BY[self.name], every_byte=every_byte)]

    def exists(self) -> bool:
        if self.name == "base":
            return (self.folder / "config.json").is_file()
        return read_manifest(self.folder) is not None

    def load(self) -> tuple[Any, Any]:
        """The model, on the GPU if there is one, and the sentencepiece processor of its tokenizer.

        Raises DataError if the model has fewer rows than the tokenizer has ids, or does not fit
        the GPU's memory.
        """
        import torch

        from chatglm_ja.chatglm3 import loading, tokenizer
        from chatglm_ja.chatglm3.loading import compute_dtype
        from chatglm_ja.chatglm3.weights import BaseWeights

        encoder = tokenizer.make_processor(self.tokenizer_model())
        try:
            if self.name == "base":
                model = loading.load_base(BaseWeights(self.folder), compute_dtype())
                model = model.to(choose_device())
            else:
                model = load_model(self.folder)
        except torch.OutOfMemoryError:
            raise DataError(
                f"{self.folder} does not fit what is free of the GPU's memory: end what else uses "
                "it, or set CUDA_VISIBLE_DEVICES= to use the CPU"
            ) from None
        rows, ids = model.config.vocab_size, encoder.get_piece_size()
        if rows < ids:
            raise DataError(
                f"{self.folder}: the model has {rows:,} embedding rows, but its tokenizer "
                f"{ids:,} ids: they do not belong together, run the step that makes it again"
            )
        return model, encoder

    def auto_tokenizer(self) -> Any:
        """The tokenizer as transformers' own, for tools that want one."""
        from chatglm_ja.chatglm3 import tokenizer_files

        return tokenizer_files.to_transformers(self.tokenizer_model())

    def tokenizer_model(self) -> Any:
        """The sentencepiece model (ModelProto), with the special tokens among its pieces."""
        from chatglm_ja.chatglm3 import tokenizer
        from chatglm_ja.chatglm3.base import Base

        if self.name == "base":
            return tokenizer.add_special_tokens(Base.open(self.folder).proto)
        return tokenizer.read_proto(self.folder / tokenizer.MODEL_FILE)


def finished_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages whose models exist. Raises ArtifactError if none does."""
    found = [stage for stage in stages if stage.exists()]
    if not found:
        raise ArtifactError(
            f"no model to talk to, neither {stages[0].folder} nor a later one: run the steps first"
        )
    return found


def find_stage(stages: Sequence[Stage], name: str) -> Stage:
    """One of the stages that are there; LATEST is the last. Raises ArtifactError if missing."""
    if name == LATEST:
        return stages[-1]
    for stage in stages:
        if stage.name == name:
            return stage
    raise ArtifactError(
        f"there is no model of the stage {name} yet: expected one of "
        f"{', '.join(stage.name for stage in stages)}"
    )


def load_model(folder: Path) -> Any:
    """A model folder of steps 3, 5 or 6, to score or answer with."""
    from transformers import GlmForCausalLM

    from chatglm_ja.chatglm3 import loading
    from chatglm_ja.chatglm3.loading import compute_dtype

    model: Any = loading.load_glm(folder, GlmForCausalLM, compute_dtype())
    return model.to(choose_device()).eval()


def choose_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# The models that step 7 compares, in the order in which they come about.
STAGES = ("base", "resized", "pretrained", "sft")

LATEST = "latest"
