"""Tasks of lm-evaluation-harness, run on loaded models.

The harness (EleutherAI, package lm_eval) is optional: requirements-extras.txt. It has tasks of its
own and reads more from a folder of YAML files; most download their data, the first time. Every text
is read after what the tokenizer puts before texts, as in training.
"""

import importlib.util
import logging
from typing import Any

from chatglm_ja.errors import ConfigError, first_line
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.settings import EvalConfig


def load_tasks(config: EvalConfig) -> Any:
    """Load the tasks of --harness-tasks and their data; return the harness's task manager.

    Raises ConfigError for an unknown name, and for data that cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--harness-tasks needs lm-evaluation-harness: run "
            "`pip install -r requirements-extras.txt`"
        )
    folder, names = config.harness_folder, config.harness_tasks
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--harness-folder {folder} is not a folder")
    from lm_eval.tasks import TaskManager

    _silence_harness()
    path = folder and str(folder)
    # Reading the harness's own thousands of task files takes half a minute.
    manager = TaskManager(include_path=path, include_defaults=folder is None)
    if folder is not None and not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=path)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}: `lm_eval ls tasks` "
            "lists its tasks, and --harness-folder adds your own"
        )
    for name in manager.match_tasks(list(names)):
        try:
            manager.load([name])
        except Exception as error:  # whatever a task or its data set raises
            raise ConfigError(
                f"lm-evaluation-harness cannot load the task {name}: {first_line(error)} (tasks "
                "that are not in --harness-folder download their data)"
            ) from error
    return manager


def run_tasks(
    config: EvalConfig, manager: Any, scorer: Scorer, auto_tokenizer: Any
) -> list[dict[str, Any]]:
    """Run the tasks; return `task`, `metric`, `value` and `stderr` (or None) of every metric.

    `auto_tokenizer` is the model's tokenizer in transformers' form.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Candidate(HFLM):
        """Scores whole texts as bits per character does: the prefix is read, not scored."""

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            scores = scorer.score_each(request.args[0] for request in requests)
            return [-score.nats for score in scores]

    # A special token spelled in a text stays text.
    auto_tokenizer.split_special_tokens = True
    candidate = Candidate(
        pretrained=scorer.model.model,
        tokenizer=auto_tokenizer,
        backend="causal",
        max_length=scorer.window,
        batch_size=scorer.batch_size,
        add_bos_token=True,
    )
    output = simple_evaluate(
        model=candidate,
        tasks=manager.match_tasks(list(config.harness_tasks)),
        task_manager=manager,
        limit=config.harness_limit or None,
        bootstrap_iters=1000,  # for the standard errors of metrics that are not means
        log_samples=False,
    )
    _silence_harness()
    assert output is not None  # None is for ranks other than 0
    return [row for task, metrics in output["results"].items() for row in _rows(task, metrics)]


def _rows(task: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a task, of whose results the keys are `metric,filter`."""
    rows = []
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{metric}_stderr,{kind}")
        rows.append(
            {
                "task": task,
                "metric": metric if kind == "none" else f"{metric} ({kind})",
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            }
        )
    return rows


def _silence_harness() -> None:
    """Hide the log lines on progress and choices that the harness writes on every run."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
