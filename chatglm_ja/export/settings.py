"""Settings of step 8."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_ja.bases.shape import read_shape
from chatglm_ja.settings import REPORTS_BYTES, Choice, StepConfig, setting
from chatglm_ja.storage.weight_files import weights_bytes


class Target(Choice):
    """The programs that a model is exported for."""

    GGUF = "gguf", "one file for llama.cpp, Ollama and LM Studio, and a Modelfile for Ollama"
    CHATGLM = "chatglm", "ChatGLM3's own names and files, for tools that know only those"


# Bytes of a weight in a GGUF file, by dtype: in q8_0, 32 of them share a float16 scale.
GGUF_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StepConfig):
    """Settings of step 8."""

    model: Path = setting("output folder of step 3, 5 or 6, or another folder of such a model")
    to: Target = setting(f"what to write: {Target.explain()}", Target.GGUF)
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = setting(
        "dtype of the matrices in a GGUF file; by default as they are stored. llama.cpp's "
        "llama-quantize makes smaller ones of it",
        None,
    )
    base_model: Path | None = setting(
        "ChatGLM3 folder whose Python files --to chatglm copies; it may have none", None
    )
    max_shard_gb: float = setting(
        "maximum size of a shard of --to chatglm in GB", 2.0, low=0.001, high=1000
    )

    def contradictions(self) -> list[str]:
        if self.to is Target.CHATGLM and self.dtype:
            return ["--dtype is for --to gguf only: --to chatglm keeps the stored dtype"]
        return []

    def disk_bytes(self) -> int:
        """Estimate the size of the weights in the dtype that they are written in."""
        if self.dtype is None:
            return REPORTS_BYTES + weights_bytes(self.model)
        return REPORTS_BYTES + int(GGUF_BYTES[self.dtype] * read_shape(self.model).weights)
