"""What a run shows: a progress bar, log lines, curves for TensorBoard, and its losses as a picture.

The callback also ends each step: it decides when to score, to save and to stop.
"""

import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from chatglm_ja import plots
from chatglm_ja.data.dataset import SourceCount
from chatglm_ja.training import validation
from chatglm_ja.training.trainer import ResumableTrainer
from chatglm_ja.training.validation import History

LOSS_PLOT_FILE = "loss.png"


class Progress(TrainerCallback):
    """Shows the progress, saves checkpoints, stops on a signal, and scores after the last step."""

    def __init__(self, trainer: ResumableTrainer, sources: Sequence[SourceCount]) -> None:
        """`sources` are those of the training conversations; empty for pretraining."""
        self.trainer = trainer
        self.sources = sources
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            # Without tqdm's own clock, which runs on while the run scores and saves.
            layout = "training: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{desc}"
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=layout)
        self.started, self.first_step = self._training_time(), state.global_step
        self.trainer.last_logged = self.started, state.global_step
        self.trainer.restore_progress()

    def _training_time(self) -> float:
        """Return the seconds on a clock that stands still while the run scores or saves."""
        return time.monotonic() - self.trainer.paused

    def _time_left(self, state: Any) -> str:
        """Estimate the remaining training time from the mean time of this process's steps."""
        seconds = self._training_time() - self.started
        done = max(state.global_step - self.first_step, 1)
        left = seconds / done * (state.max_steps - state.global_step)
        return f"{tqdm.format_interval(left)} left"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        trainer.end_step()
        if self.bar is not None:
            self.bar.set_description_str(f", {self._time_left(state)}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        is_last = state.global_step == state.max_steps
        if is_last:
            control.should_log = True  # even if there are fewer steps than --logging-steps
            control.should_evaluate = args.eval_strategy != "no"
        trainer.is_unscored = control.should_evaluate
        if trainer.checkpoints is not None:
            is_due = state.global_step % trainer.config.save_steps == 0
            is_due |= state.global_step == trainer.last_constant_step
            control.should_save = is_due and not is_last  # only publishing is left
        if trainer.should_stop:
            trainer.stop(control)

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
        bits = validation.language_bits(logs)
        for language, loss in losses.items():
            suffix = f" ({bits[language]:.3f} bits/char)" if language in bits else ""
            parts.append(f"{language} {loss:.4f}{suffix}")
        if self.sources and validation.has_sources(logs):
            table = "\n".join(validation.describe_losses(self.sources, state.log_history))
            self.bar.write(table, file=sys.stderr)
        if len(parts) > 1:
            self.bar.write(" | ".join(parts), file=sys.stderr)

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()


def make_tensorboard_callback(folder: Path, resumed_step: int | None) -> TrainerCallback:
    """Return a callback that writes curves to `folder`; a resumed run adds to them."""
    from torch.utils.tensorboard import SummaryWriter

    if resumed_step is None:
        shutil.rmtree(folder, ignore_errors=True)
    purge_step = None if resumed_step is None else resumed_step + 1
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=purge_step))


def draw_losses(
    axis: Any, history: History, tokens_per_step: int = 1, scale: str = "linear"
) -> None:
    """Draw the losses of a Trainer's log on an axis, over the tokens, or by default the steps."""
    history = [entry for entry in history if entry["step"] or scale != "log"]  # which has no zero
    trained = [
        (entry["step"] * tokens_per_step, entry["loss"]) for entry in history if "loss" in entry
    ]
    if trained:
        axis.plot(*zip(*trained, strict=True), label="training", color=plots.INK)
    draw_languages(axis, history, validation.language_losses, tokens_per_step)


def draw_languages(
    axis: Any,
    history: History,
    values_of: Callable[[Mapping[str, Any]], Mapping[str, float]] = validation.language_bits,
    tokens_per_step: int = 1,
) -> None:
    """Draw what `values_of` finds in the log's entries: a curve in its color for each language."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for entry in history:
        for language, value in values_of(entry).items():
            curves[language].append((entry["step"] * tokens_per_step, value))
    # Sorted, because entries read back from a checkpoint are.
    for language, color in plots.language_colors(sorted(curves)).items():
        points = zip(*curves[language], strict=True)
        axis.plot(*points, label=f"validation {language}", color=color, marker="o", markersize=4)


def plot_losses(history: History, tokens_per_step: int, folder: Path) -> None:
    """Write `folder`/loss.png: the losses of a Trainer's log on linear and on logarithmic axes.

    Writes nothing if no training loss was logged.
    """
    if not any("loss" in entry for entry in history):
        return
    figure, axes = plots.make_figure(10, 3.6, ncols=2)
    for axis, scale in zip(axes, ("linear", "log"), strict=True):
        draw_losses(axis, history, tokens_per_step, scale)
        axis.set(xscale=scale, yscale=scale, xlabel="tokens", ylabel="nats per token")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False, fontsize=8)
    plots.save_png(figure, folder / LOSS_PLOT_FILE)
