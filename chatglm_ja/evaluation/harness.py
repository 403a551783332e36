"""Any task of lm-evaluation-harness, on the models at hand.

The harness (EleutherAI, package lm_eval) is optional: requirements-extras.txt. It knows its own
tasks by name, and those in a folder of YAML files besides; most load their data by name, which
needs a network the first time. Every text is read with [gMASK] sop before it, as ChatGLM3 was
trained to read one.
"""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_ja.errors import ConfigError
from chatglm_ja.evaluation import likelihood

ROUNDS = 1000  # bootstrap rounds for the errors of metrics that are not means


@dataclass(frozen=True)
class HarnessTasks:
    """The tasks to run, by name; `folder` has more of them, `limit` is documents of each, or 0."""

    names: Sequence[str]
    folder: Path | None
    limit: int

    def open(self) -> Any:
        """The harness's task manager, when all tasks and their data are there.

        Raises ConfigError for a name that it does not know, and for data that it cannot load.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(
                "--harness-tasks needs lm-evaluation-harness: run "
                "`pip install -r requirements-extras.txt`"
            )
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"--harness-folder {self.folder} is no folder")
        from lm_eval.tasks import TaskManager

        _be_quiet()
        path = self.folder and str(self.folder)
        # Reading the harness's own thousands of task files takes half a minute.
        manager = TaskManager(include_path=path, include_defaults=self.folder is None)
        if self._unknown(manager) and self.folder is not None:
            manager = TaskManager(include_path=path)
        if unknown := self._unknown(manager):
            raise ConfigError(
                f"lm-evaluation-harness knows no task {', '.join(unknown)}: `lm_eval ls tasks` "
                "lists them, and --harness-folder adds a folder of your own"
            )
        for name in manager.match_tasks(list(self.names)):
            try:
                manager.load([name])
            except Exception as error:  # whatever a task and its data set raise
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise ConfigError(
                    f"lm-evaluation-harness cannot load the task {name}: {reason} (tasks that are "
                    "not in --harness-folder load their data from a network)"
                ) from error
        return manager

    def _unknown(self, manager: Any) -> list[str]:
        return [name for name in self.names if not manager.match_tasks([name])]

    def run(
        self, manager: Any, model: Any, encoder: Any, tokenizer: Any, window: int, batch_size: int
    ) -> list[dict[str, Any]]:
        """The metrics of every task: `task`, `metric`, `value`, and `stderr` or None."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        class Candidate(HFLM):
            """Scores whole texts as bits per character are: the prefix is read, not scored."""

            def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
                texts = [request.args[0] for request in requests]
                scores = likelihood.score_each(model, encoder, texts, window, batch_size)
                return [-score.nats for score in scores]

        # What a text spells stays text.
        tokenizer.split_special_tokens = True
        candidate = Candidate(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=window,
            batch_size=batch_size,
            add_bos_token=True,
        )
        output = simple_evaluate(
            model=candidate,
            tasks=manager.match_tasks(list(self.names)),
            task_manager=manager,
            limit=self.limit or None,
            bootstrap_iters=ROUNDS,
            log_samples=False,
        )
        _be_quiet()
        assert output is not None  # only ranks other than 0 get nothing
        rows = []
        for task, metrics in output["results"].items():
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


def _be_quiet() -> None:
    """What the harness tells about its progress and its choices, on every run."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
