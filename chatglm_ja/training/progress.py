"""What a training run shows while it goes on: a bar, a line now and then, curves for TensorBoard.

The callback also says when to score, to save and to stop: it sees every step end.
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from chatglm_ja.data import dataset
from chatglm_ja.training import source_losses, validation
from chatglm_ja.training.trainer import ResumableTrainer


class Progress(TrainerCallback):
    """A progress bar, a line per logging step and evaluation, checkpoints, the end on a signal,
    and an evaluation at the end."""

    def __init__(self, trainer: ResumableTrainer, sources: Sequence[dataset.SourceCount]) -> None:
        """`sources` are those of the conversations that are trained on, where there are any."""
        self.trainer = trainer
        self.sources = sources
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            # tqdm's own clock goes on while the run scores and saves.
            shown = "training: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{desc}"
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=shown)
        self.started, self.first_step = self._training_time(), state.global_step
        self.trainer.last_logged = self.started, state.global_step

    def _training_time(self) -> float:
        """Seconds by a clock that stands still while the run scores or saves."""
        return time.monotonic() - self.trainer.paused

    def _time_left(self, state: Any) -> str:
        """Of training alone, by the mean of this process's steps."""
        seconds = self._training_time() - self.started
        done = max(state.global_step - self.first_step, 1)
        left = seconds / done * (state.max_steps - state.global_step)
        return f"{tqdm.format_interval(left)} left"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if self.bar is not None:
            self.bar.set_description_str(f", {self._time_left(state)}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        is_last = state.global_step == state.max_steps
        if is_last:
            control.should_log = True  # however few steps there are
            control.should_evaluate = args.eval_strategy != "no"
        if trainer.checkpoints is not None:
            is_due = state.global_step % trainer.config.save_steps == 0
            # After the last step there is nothing to go on with.
            control.should_save = (is_due or trainer.should_stop) and not is_last
        control.should_training_stop |= trainer.should_stop

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is None:
            return
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if "loss" in logs:
            parts += [
                f"{state.global_step / state.max_steps:.0%}",
                f"loss {logs['loss']:.4f}",
                f"lr {logs['learning_rate']:.2e}",
                f"grad norm {logs.get('grad_norm', math.nan):.2f}",
                f"{logs['tokens_per_second']:,.0f} tokens/s",
                *([f"{logs['mfu']:.1%} MFU"] if "mfu" in logs else []),
                f"{logs['memory_gb']:.2f} GB",
                self._time_left(state),
            ]
        losses = validation.language_losses(logs)
        if losses:
            parts.append("validation loss")
        for language, loss in losses.items():
            bits = logs.get(f"{validation.LANGUAGE}{language}{validation.BITS}")
            more = "" if bits is None else f" ({bits:.3f} bits/char)"
            parts.append(f"{language} {loss:.4f}{more}")
        if self.sources and source_losses.are_scored(logs):
            table = "\n".join(source_losses.describe_losses(self.sources, state.log_history))
            self.bar.write(table, file=sys.stderr)
        if len(parts) > 1:
            self.bar.write(" | ".join(parts), file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def tensorboard(folder: Path, resumed_after: int | None) -> TrainerCallback:
    """Curves for TensorBoard in `folder`; those of a run that is resumed go on after that step."""
    from torch.utils.tensorboard import SummaryWriter

    if resumed_after is None:
        shutil.rmtree(folder, ignore_errors=True)
        return TensorBoardCallback(SummaryWriter(str(folder)))
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=resumed_after + 1))
