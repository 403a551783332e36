"""Settings of step 7."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_ja.bases.families import NO_BASE_MODEL
from chatglm_ja.data.settings import ReadingConfig
from chatglm_ja.inference.models import LATEST, STAGES, Stage
from chatglm_ja.settings import setting
from chatglm_ja.sources import Source


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ReadingConfig):
    """Step 7."""

    base_model: Path = setting("the base model's folder", unset=NO_BASE_MODEL)
    tokenizer: Path = setting("output folder of step 2")
    resized: Path = setting("output folder of step 3")
    pretrained: Path = setting("output folder of step 5")
    sft: Path = setting("output folder of step 6")
    sources: tuple[Source, ...] = setting("held-out texts: LANGUAGE=PATH_OR_DATASET[#COLUMN]")
    max_chars: int = setting("characters scored per language", 200_000, low=1)
    window: int = setting("longest context in tokens when scoring texts", 1024, low=8)
    prompts: Path = setting("YAML file of questions to answer: language -> list")
    conversations: tuple[Source, ...] = setting(
        "held-out conversations whose questions the fine-tuned model answers: "
        "KIND=PATH_OR_DATASET[#COLUMNS]; a kind is the language of the answers, or code",
        (),
    )
    choices: tuple[Source, ...] = setting(
        "multiple-choice questions: LANGUAGE=PATH_OR_DATASET, with the columns question, choices "
        "(a list) and answer (the index of the right one, from 0)",
        (),
    )
    parallel: tuple[Source, ...] = setting(
        "held-out translations, single lines: LANGUAGE=PATH_OR_DATASET#FROM>TO; the columns name "
        "the languages in prompts, LANGUAGE is that of the translations",
        (),
    )
    translations: int = setting("lines of each of --parallel to translate", 16, low=1)
    max_new_tokens: int = setting("longest answer in tokens", 256, low=1)
    temperature: float = setting(
        "sampling temperature of sampled answers (0: greedy decoding)", 0.8, low=0, high=5
    )
    top_p: float = setting(
        "nucleus sampling: sample from the likeliest tokens with this total probability",
        0.8,
        low=0.01,
        high=1,
    )
    harness_tasks: tuple[str, ...] = setting(
        "tasks of lm-evaluation-harness by name; needs requirements-extras.txt", ()
    )
    harness_folder: Path | None = setting(
        "folder with YAML files of more tasks; they can run Python code beside them, so use only "
        "files you trust",
        None,
    )
    harness_limit: int = setting("documents per task (0: all)", 0, low=0)
    batch_size: int = setting("windows per batch when scoring", 16, low=1, affects_result=False)
    answer_batch_size: int = setting("answers per batch; sampled answers depend on it", 32, low=1)
    chat: bool = setting("chat with a model in the terminal", False, affects_result=False)
    web: bool = setting(
        "chat with models on a web page; needs requirements-extras.txt", False, affects_result=False
    )
    stage: Literal[LATEST, *STAGES] = setting(  # type: ignore[valid-type]
        "the model of --chat and --web", LATEST, affects_result=False
    )
    port: int = setting(
        "port of --web, open to this machine only", 7860, low=1, high=65535, affects_result=False
    )
    answer_seconds: float = setting(
        "time limit of an answer of --web in seconds", 300.0, low=1, affects_result=False
    )

    def stages(self) -> list[Stage]:
        """Return the stages to compare, from the base to the fine-tuned model."""
        folders = (self.base_model, self.resized, self.pretrained, self.sft)
        return [Stage(name, folder) for name, folder in zip(STAGES, folders, strict=True)]

    def contradictions(self) -> list[str]:
        problems = []
        if self.chat and self.web:
            problems.append("--chat and --web exclude each other: choose one")
        if self.harness_folder is not None and not self.harness_tasks:
            problems.append("--harness-folder needs --harness-tasks: name the tasks to run")
        return problems
