"""Settings of step 7."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_ja.bases.families import NO_BASE_MODEL
from chatglm_ja.data.settings import ReadingConfig
from chatglm_ja.inference.models import LATEST, STAGES, Stage
from chatglm_ja.settings import Choice, setting
from chatglm_ja.sources import Source


class TaskFormat(Choice):
    """How a question of --tasks is written."""

    TEXT = "text", "llm-jp-eval's own prompt, as a text that the model continues"
    CHAT = "chat", "the base's chat format, the examples as earlier turns"


def examples_file(path: Path) -> Path | None:
    """Return llm-jp-eval's file of examples for one of its data sets: train/NAME beside its folder.

    None if there is no such file.
    """
    folder = path.resolve().parent
    examples = folder.parent / "train" / path.name
    return examples if folder.name != "train" and examples.is_file() else None


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
    choices_shots: int = setting(
        "examples before each multiple-choice question, from the same source", 0, low=0
    )
    tasks: tuple[Path, ...] = setting(
        "JSON files of llm-jp-eval; their char_f1 needs requirements-extras.txt", ()
    )
    task_format: TaskFormat = setting(
        f"how a question of --tasks is written ({TaskFormat.explain()})", TaskFormat.TEXT
    )
    task_shots: int = setting("examples before each question of --tasks", 4, low=0)
    task_limit: int = setting("questions of each file of --tasks (0: all)", 0, low=0)
    judge_questions: tuple[Path, ...] = setting(
        "files of open questions whose answers are written to answers/ for a judge: lines of JSON "
        "or .csv, with the columns of MT-Bench (question_id, turns) or of ELYZA-tasks-100 (input)",
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
    benchmarks_only: bool = setting(
        "run --tasks, --judge-questions and --harness-tasks and nothing else, on the model of "
        "--stage; the result is a folder of its own",
        False,
    )
    batch_size: int = setting("windows per batch when scoring", 16, low=1, affects_result=False)
    answer_batch_size: int = setting("answers per batch; sampled answers depend on it", 32, low=1)
    chat: bool = setting("chat with a model in the terminal", False, affects_result=False)
    web: bool = setting(
        "chat with models on a web page; needs requirements-extras.txt", False, affects_result=False
    )
    stage: Literal[LATEST, *STAGES] = setting(  # type: ignore[valid-type]
        "the model of --chat, --web and --benchmarks-only", LATEST, affects_result=False
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

    def task_files(self) -> list[Path]:
        """Return the files of --tasks, each followed by the one with its examples, if any."""
        pairs = ((path, examples_file(path)) for path in self.tasks)
        return [file for pair in pairs for file in pair if file is not None]

    def contradictions(self) -> list[str]:
        problems = []
        if self.chat and self.web:
            problems.append("--chat and --web exclude each other: choose one")
        if self.harness_folder is not None and not self.harness_tasks:
            problems.append("--harness-folder needs --harness-tasks: name the tasks to run")
        benchmarks = (self.tasks, self.judge_questions, self.harness_tasks)
        if self.benchmarks_only and not any(benchmarks):
            problems.append(
                "--benchmarks-only needs --tasks, --judge-questions or --harness-tasks: name what "
                "to run"
            )
        for name, paths in (("--tasks", self.tasks), ("--judge-questions", self.judge_questions)):
            counts = Counter(path.stem for path in paths)
            if twice := [stem for stem, count in counts.items() if count > 1]:
                problems.append(
                    f"{name} has two files named {twice[0]}, which results could not tell apart: "
                    "rename one"
                )
        return problems
