"""Data sets of llm-jp-eval, read from its JSON files and scored by its own definitions.

llm-jp-eval (https://github.com/llm-jp/llm-jp-eval) brings all data sets of its suite into one form,
in the folders evaluation/dev/, test/ and train/:

    {
      "instruction": "質問を入力とし、回答を出力してください。...",
      "output_length": 15,                                    the longest answer in tokens
      "metrics": ["char_f1"],
      "few_shots": [{"input": "質問:...", "output": "YES"}, ...],
      "samples": [{"input": "質問:...", "output": "YES"}, ...]
    }

Newer versions leave out `few_shots` and take the samples of the file of the same name in train/. An
answer is generated greedily. It ends before its first empty line, because a model that was not
fine-tuned goes on with a question of its own.
"""

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.data import cleaning
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.evaluation.paired import summarize
from chatglm_ja.evaluation.settings import EvalConfig, TaskFormat, examples_file
from chatglm_ja.inference import generation
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.messages import Message
from chatglm_ja.storage.files import read_json

log = logging.getLogger(__name__)

# The prompt of llm-jp-eval, by the data set's language: what comes first, and the headings of an
# example.
PROMPTS = {
    "ja": (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
        "要求を適切に満たす応答を書きなさい。\n\n### 指示:\n",
        "\n\n### 入力:\n",
        "\n\n### 応答:\n",
    ),
    "en": (
        "Here is a combination of instructions explaining the task and inputs with context. "
        "Please write a response that adequately meets the request.\n\n### Instruction:\n",
        "\n\n### Input:\n",
        "\n\n### Response:\n",
    ),
}
_LATIN_1 = re.compile("[\x80-\xff]")
_NOT_ALPHANUMERIC = re.compile(r"\W")


class Example(pydantic.BaseModel):
    """A question and its answer."""

    input: str
    output: str


class _File(pydantic.BaseModel):
    """What is read of a file; the suite's other fields are not needed."""

    instruction: str
    output_length: Annotated[int, pydantic.Field(gt=0)]
    metrics: list[str]
    few_shots: list[Example] | None = None
    samples: Annotated[list[Example], pydantic.Field(min_length=1)]
    language: Literal["ja", "en"] = "ja"


@dataclass(frozen=True)
class Task:
    """A data set: its questions, the examples before each of them, and METRICS to score with."""

    name: str
    instruction: str
    language: str
    output_length: int
    metrics: tuple[str, ...]
    shots: tuple[Example, ...]
    samples: tuple[Example, ...]

    def text_prompt(self, question: str) -> str:
        """Return the prompt of llm-jp-eval, which the answer continues."""
        first, before_input, before_output = PROMPTS[self.language]
        shots = (f"{before_input}{s.input}{before_output}{s.output}" for s in self.shots)
        return f"{first}{self.instruction}{''.join(shots)}{before_input}{question}{before_output}"

    def messages(self, question: str) -> list[Message]:
        """Return the examples as earlier exchanges of a conversation; the first has the task."""
        questions = [*(shot.input for shot in self.shots), question]
        questions[0] = f"{self.instruction}\n\n{questions[0]}"
        messages: list[Message] = []
        for text, shot in zip(questions, self.shots, strict=False):
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": shot.output})
        return [*messages, {"role": "user", "content": questions[-1]}]


def exact_match(answer: str, expected: str) -> float:
    """Return 1 if the texts are equal, else 0."""
    return float(answer == expected)


def char_f1(answer: str, expected: str) -> float:
    """Return the characters' likeness from 0 to 1, in steps of 0.01.

    llm-jp-eval computes it as fuzzywuzzy's token_sort_ratio: twice the longest common subsequence,
    divided by the sum of the lengths, of words in lower case, sorted, without punctuation. So it
    depends on the order of characters, and is no F1 of sets of characters. rapidfuzz computes the
    same, without fuzzywuzzy's license (GPL) and its removal of Latin-1 letters, which is here.
    """
    from rapidfuzz import fuzz

    words = (_NOT_ALPHANUMERIC.sub(" ", _LATIN_1.sub("", text)) for text in (answer, expected))
    return round(fuzz.token_sort_ratio(*(text.lower().strip() for text in words))) / 100


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "char_f1": char_f1,
}


def read_tasks(config: EvalConfig) -> list[Task]:
    """Read the files of --tasks.

    Raises DataError for a file of another form, or with no metric of METRICS; ConfigError if it has
    fewer examples than --task-shots, and if a package is missing.
    """
    tasks = [_read_task(path, config) for path in config.tasks]
    if any("char_f1" in task.metrics for task in tasks):
        try:
            import rapidfuzz  # noqa: F401
        except ImportError:
            raise ConfigError(
                "--tasks with char_f1 needs rapidfuzz: run `pip install -r requirements-extras.txt`"
            ) from None
    return tasks


def _read_task(path: Path, config: EvalConfig) -> Task:
    file = _read_file(path)
    known = tuple(name for name in METRICS if name in file.metrics)
    if not known:
        raise DataError(
            f"{path} has the metrics {', '.join(file.metrics) or 'none'}: expected "
            f"{' or '.join(METRICS)}"
        )
    if unknown := [name for name in file.metrics if name not in METRICS]:
        log.warning("%s: without its metrics %s", path, ", ".join(unknown))
    shots = file.few_shots
    if shots is None:
        examples = examples_file(path)
        shots = _read_file(examples).samples if examples else []
    if len(shots) < config.task_shots:
        raise ConfigError(
            f"{path} has {len(shots)} examples in few_shots: expected the {config.task_shots} of "
            f"--task-shots; pass --task-shots {len(shots)}"
        )
    samples = file.samples[: config.task_limit or None]
    return Task(
        path.stem, file.instruction, file.language, file.output_length, known,
        tuple(shots[: config.task_shots]), tuple(samples),
    )  # fmt: skip


def _read_file(path: Path) -> _File:
    try:
        return _File.model_validate(read_json(path), strict=True)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the file"
        reason = f"{place}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:
        reason = f"no JSON: {error}"
    raise DataError(
        f"{path} is no data set of llm-jp-eval ({reason}): expected a JSON file with "
        "instruction, output_length, metrics, few_shots and samples"
    )


def run_tasks(
    config: EvalConfig, tasks: Sequence[Task], model: LoadedModel, stage: str
) -> list[dict[str, Any]]:
    """Answer all questions; return `value` and `stderr` of every task and metric.

    `value` is the mean of the metric over the questions, `stderr` its standard error (None for a
    single question). Raises ConfigError if the model has no chat format but is to use it, and
    DataError for a question that is too long.
    """
    prompts = [
        [_build_prompt(config, task, sample, model.tokenizer) for sample in task.samples]
        for task in tasks
    ]
    for task, own in zip(tasks, prompts, strict=True):
        generation.check_lengths(model, own, task.output_length, f"--tasks {task.name}")
    rows = []
    for task, own in zip(tasks, prompts, strict=True):
        answers = generation.generate_answers(
            model, own, task.output_length,
            batch_size=config.answer_batch_size, title=f"{stage}: {task.name}",
        )  # fmt: skip
        pairs = [
            (normalize(answer.text.partition("\n\n")[0]), normalize(sample.output))
            for answer, sample in zip(answers, task.samples, strict=True)
        ]
        for metric in task.metrics:
            scores = summarize(np.array([METRICS[metric](*pair) for pair in pairs]))
            rows.append(
                {
                    "task": task.name,
                    "metric": metric,
                    "questions": scores["items"],
                    "shots": len(task.shots),
                    "value": scores["mean"],
                    "stderr": scores["error"],
                }
            )
    return rows


def normalize(text: str) -> str:
    """Return a text as it is compared: full-width and half-width forms are one (NFKC)."""
    return unicodedata.normalize("NFKC", text).strip()


def _build_prompt(
    config: EvalConfig, task: Task, sample: Example, tokenizer: ModelTokenizer
) -> list[int]:
    def clean(text: str) -> str:
        return cleaning.clean_characters(text, config.unicode_form)

    if config.task_format is TaskFormat.TEXT:
        return [*tokenizer.prefix, *tokenizer.encode(clean(task.text_prompt(sample.input)))]
    if not tokenizer.has_chat_format:
        raise ConfigError(
            "--task-format chat needs a base with a chat template, which this one has not: pass "
            "--task-format text"
        )
    return tokenizer.build_prompt(
        [
            {**message, "content": clean(message["content"])}
            for message in task.messages(sample.input)
        ]
    )
