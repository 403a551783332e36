"""Published benchmarks, which need none of the other measures and can be run alone.

tasks          data sets of llm-jp-eval
judged         answers to open questions, for a judge
harness        tasks of lm-evaluation-harness
"""

import logging
from typing import Any

from chatglm_ja.errors import ConfigError
from chatglm_ja.evaluation import harness, judged, llm_jp_eval
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference.models import Stage

log = logging.getLogger(__name__)


def load_scorer(stage: Stage, config: EvalConfig) -> Scorer:
    """Load a stage's model. Raises ConfigError if its window is too short."""
    log.info("%s: loading %s", stage.name, stage.folder)
    model = stage.load()
    if config.window > model.window:
        raise ConfigError(
            f"--window {config.window} is more than the {model.window} positions of {stage.folder}"
        )
    return Scorer(model, config.window, config.batch_size)


class Benchmarks:
    """The benchmarks that the settings name. All data is read when it is made."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.tasks = llm_jp_eval.read_tasks(config)
        self.questions = judged.read_questions(config.judge_questions)
        self.task_manager = harness.load_tasks(config) if config.harness_tasks else None

    def run(self, stage: Stage, scorer: Scorer) -> dict[str, Any]:
        """Return the results of a stage, empty for what the settings do not name."""
        config, model = self.config, scorer.model
        tasks = llm_jp_eval.run_tasks(config, self.tasks, model, stage.name)
        answered: judged.Answered = {}
        if self.questions and model.tokenizer.has_chat_format:
            answered = judged.answer_questions(config, self.questions, model, stage.name)
        elif self.questions:
            log.info("%s: no answers for a judge, the base has no chat template", stage.name)
        rows: list[dict[str, Any]] = []
        if self.task_manager is not None:
            tokenizer = model.tokenizer.to_transformers()
            rows = harness.run_tasks(config, self.task_manager, scorer, tokenizer)
        return {"tasks": tasks, "judged": answered, "harness": rows}
