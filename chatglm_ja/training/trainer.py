"""The Trainer of steps 5 and 6: transformers' own, with five additions.

* a separate learning rate for the embeddings
* validation losses that are exact means per token (validation.py)
* steps with a bad loss are skipped on all processes (spikes.py)
* checkpoints from which any number of processes can resume (checkpoints.py)
* SIGTERM and Ctrl-C end the run after a checkpoint, also during a validation
"""

import logging
import math
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainingArguments

from chatglm_ja.bases.shape import read_shape
from chatglm_ja.data import dataset
from chatglm_ja.training import costs
from chatglm_ja.training.adapter import read_embeddings
from chatglm_ja.training.checkpoints import (
    Checkpoints,
    before_decay_path,
    copy_state,
    load_random_states,
    load_state,
    load_weights,
    set_weights,
)
from chatglm_ja.training.model import Collator
from chatglm_ja.training.optimizer import make_optimizer, skip_step_if
from chatglm_ja.training.rows import EpochSampler
from chatglm_ja.training.settings import CHECKPOINT_BYTES, TrainingConfig
from chatglm_ja.training.spikes import SpikeGuard
from chatglm_ja.training.validation import ALL_LOSS, SOURCE, History, Validation, token_sources
from chatglm_ja.training.watchdog import Watchdog

log = logging.getLogger(__name__)

# What `log` adds to a line of training.
MEASURED = ("tokens_per_second", "mfu", "memory_gb")
# The first rows, from which the lengths of documents and the share of trained tokens are estimated.
SAMPLED_ROWS = 256


class ResumableTrainer(Trainer):
    """transformers' Trainer with the additions that the module's docstring lists."""

    def __init__(
        self,
        config: TrainingConfig,
        model: Any,
        rows: Any,
        sampler: EpochSampler,
        validation: Validation | None,
        checkpoints: Checkpoints | None,
        watchdog: Watchdog,
        arguments: TrainingArguments,
    ) -> None:
        self.config = config
        self.sampler = sampler
        self.validation = validation
        self.checkpoints = checkpoints
        self.watchdog = watchdog
        self.tokens_per_step = config.global_batch_size * dataset.count_tokens(rows) // len(rows)
        shape, lengths = read_shape(config.model), rows[:SAMPLED_ROWS]["lengths"]
        if not config.document_mask:
            lengths = [[sum(row)] for row in lengths]
        self.flops_per_token = costs.flops_per_token(
            shape,
            config.count_parameters(shape),
            config.trained_linears(shape),
            context=costs.mean_context(lengths),
            scored=sampler.mix(dataset.scored_share(rows, SAMPLED_ROWS), 1.0),
        )
        self.peak_tflops: float | None = None
        if torch.cuda.is_available():
            self.peak_tflops = costs.peak_tflops(torch.cuda.get_device_name())
        self.paused = 0.0  # seconds spent on other things than training
        self.last_logged = (time.monotonic(), 0)  # time without pauses, step
        fixed_length = config.block_size if config.compile and config.packing else 0
        self.collate = Collator(config.document_mask, fixed_length)
        self.guard = SpikeGuard(config.max_loss_jump, config.max_skipped_steps)
        self.resumed: dict[str, Any] = {}  # the progress that a checkpoint stored
        self.grad_norm = torch.zeros(())  # of the last step
        # Of each micro-batch of this step, on the device: its loss per token, and a signal to stop.
        self.micro_batches: list[torch.Tensor] = []
        self.reduction = ExitStack()  # of the gradients of several micro-batches
        self.signal_seen = False  # by this process
        self.should_stop = False  # all processes, after the same step
        self.is_unscored = False  # the validation due after this step is not finished
        self.last_constant_step: int | None = None  # before the decay, if there is such a phase
        # The Trainer calls `evaluate` only if it has an eval_dataset.
        super().__init__(
            model,
            arguments,
            data_collator=self.collate,
            train_dataset=rows,
            eval_dataset=None if validation is None else validation.rows,
        )

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward on a micro-batch; return its loss, the mean over all processes.

        A non-finite loss, or one above the guard's limit, makes the gradients NaN on all processes,
        so that the optimizer skips the step. Nothing here waits for the device, so that the host
        can prepare the next micro-batch meanwhile: `end_step` reads what is kept.

        The Trainer sums what is returned until the next log line. As all processes have the same
        sum, a checkpoint needs only one, whatever the number of processes that resume from it.
        """
        self.watchdog.progress()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # One collective for all values. The loss of a process is its share of the step's mean,
        # times the number of processes.
        host_values = (len(inputs["trained"]), self.signal_seen)
        trained, signal_seen = (torch.full((), float(v), device=loss.device) for v in host_values)
        stacked = torch.stack([loss.detach(), trained, num_items_in_batch.float(), signal_seen])
        mean, mean_trained, item_count, stop = self.accelerator.reduce(stacked, reduction="mean")
        # The loss per token of this micro-batch or, if smaller, its share of the step's loss scaled
        # up: one long answer has a large share, one short answer may have a large loss per token.
        tokens = mean_trained * self.args.world_size
        scaled_share = mean * self.current_gradient_accumulation_steps
        per_token = torch.minimum(mean * item_count / tokens.clamp(min=1), scaled_share)
        per_token = torch.where(tokens > 0, per_token, 0.0)
        self.micro_batches.append(torch.stack([per_token, stop]))
        is_good = per_token.isfinite() & (per_token <= self.guard.limit)
        self._compute_gradients(loss * torch.where(is_good, 1.0, math.nan))
        usual = self.guard.mean / self.current_gradient_accumulation_steps
        return torch.where(is_good, mean, usual)  # keeps NaN out of the logged mean

    def _compute_gradients(self, loss: torch.Tensor) -> None:
        """Run the backward pass; under DeepSpeed also the optimizer after the last micro-batch.

        ZeRO-2 would reduce the gradients in each micro-batch. If a step has several, they are
        summed in this process first, and sent once.
        """
        if not self.is_deepspeed_enabled:
            self.accelerator.backward(loss)
            return
        engine: Any = self.model_wrapped
        engine.set_gradient_accumulation_boundary(True)  # of a reduction, and of a step
        if self.current_gradient_accumulation_steps > 1 and len(self.micro_batches) == 1:
            self.reduction.enter_context(engine.coalesce_grad_reduction())
        engine.backward(loss, scale_wrt_gas=False)
        if self.accelerator.sync_gradients:
            self.reduction.close()
            engine.step()

    def end_step(self) -> None:
        """Read the step's values from the device, at once, and decide whether the run continues.

        The host waits here. If it read them a step later, the limit of a loss would be that of the
        step before, skipped steps would end a run a step late, and a run resumed from a checkpoint,
        which has to know all losses, would have another limit than an undisturbed one.
        """
        norm = self.grad_norm.to(self.args.device, torch.float32)
        *values, grad_norm = torch.cat([*self.micro_batches, norm[None]]).tolist()
        losses, stops = values[::2], values[1::2]
        self.micro_batches.clear()
        self.should_stop |= max(stops) > 0
        if self.accelerator.optimizer_step_was_skipped and not self.args.fp16:
            # With DeepSpeed the Trainer does not advance the schedule for a skipped step.
            self.lr_scheduler.step()  # type: ignore[union-attr]
        self.guard.end_step(self.state.global_step, losses, grad_norm)
        if self.checkpoints is not None:
            self.checkpoints.raise_failure()

    def stop(self, control: TrainerControl) -> None:
        """Let the Trainer save a checkpoint and end, without a validation that is due.

        A run that resumes from the checkpoint begins with that validation.
        """
        control.should_evaluate = False
        control.should_save = self.checkpoints is not None and self.state.global_step > 0
        control.should_training_stop = True

    def _run_epoch(self, *given: Any, **named: Any) -> None:
        """Train, unless the validation before it was stopped, or after the last step."""
        if self.should_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            model: Any = self.model
            model.train()
            super()._run_epoch(*given, **named)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the Trainer counts parameters in every micro-batch for a total nobody reads."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Tell the optimizer, on the device, to skip a step with non-finite gradients.

        The Trainer calls this just before the optimizer's step. In fp16 the scaler skips such steps
        and halves its scale; they are normal until it has found a scale that fits. DeepSpeed skips
        them in any precision.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None:
            return None
        if not self.args.fp16:
            self.grad_norm = torch.as_tensor(norm).detach()
            if not self.is_deepspeed_enabled:
                skip_step_if(self.optimizer, ~self.grad_norm.isfinite())
        # JSON has neither NaN nor infinity: the log shows 0 for a skipped step.
        return torch.as_tensor(norm, dtype=torch.float64).nan_to_num(0.0, 0.0, 0.0)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create AdamW of LoRA matrices and embeddings."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.config, model or self.model)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the schedule of warm-up, constant phase and decay (MiniCPM, arXiv 2404.06395)."""
        rest = num_training_steps - self.args.get_warmup_steps(num_training_steps)
        decay = min(max(1, round(self.config.decay_ratio * num_training_steps)), rest)
        if decay < rest:
            self.last_constant_step = num_training_steps - decay
        self.args.lr_scheduler_kwargs = {"num_decay_steps": decay}
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed since the last line, MFU if the GPU is known, and peak memory; then log.

        Peak memory is that of the GPU or, without one, of this process.
        """
        if "loss" in logs:
            now, step = time.monotonic() - self.paused, self.state.global_step
            then, last_step = self.last_logged
            speed = (step - last_step) * self.tokens_per_step / (now - then)
            self.last_logged = now, step
            logs["tokens_per_second"] = round(speed, 1)
            if self.peak_tflops is not None:
                rate = self.flops_per_token * speed / self.args.world_size
                logs["mfu"] = round(rate / (self.peak_tflops * 1e12), 4)
            if torch.cuda.is_available():
                peak_bytes = torch.cuda.max_memory_allocated()
            else:
                peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            logs["memory_gb"] = round(peak_bytes / 1e9, 3)
        super().log(logs, start_time)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude what happens inside from the throughput measurement."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # queued work belongs to training
        started = time.monotonic()
        try:
            yield
        finally:
            self.paused += time.monotonic() - started

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    # Checkpoints. The Trainer calls the methods that load with the folder of one.

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        pass  # `_prepare_for_training` loads everything but the random states

    def _prepare_for_training(self, max_steps: int, loader: Any, checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, loader, None)
        if checkpoint is not None:
            self.resumed = load_state(self, Path(checkpoint))
            self.args.eval_on_start = self.is_unscored = self.resumed["is_unscored"]
        elif self.config.continue_from is not None:
            load_weights(self, before_decay_path(self.config.continue_from))
        elif self.is_deepspeed_enabled:
            # DeepSpeed made its float32 masters from weights in half precision.
            set_weights(self, read_embeddings(self.config.model, self.model))
        return prepared

    def restore_progress(self) -> None:
        """Restore what the Trainer resets before the first step of a resumed run."""
        if self.resumed:
            self._tr_loss += self.resumed["loss_sum"]
            self._globalstep_last_logged = self.resumed["last_logged"]
            self.guard.restore(self.resumed)

    def _load_rng_state(self, checkpoint: Any) -> None:
        if checkpoint is not None:
            load_random_states(self, Path(checkpoint))

    def _save_checkpoint(self, *_: Any) -> None:
        self.watchdog.progress()
        model: Any = self.model
        step = self.state.global_step
        is_before_decay = step == self.last_constant_step
        needed = CHECKPOINT_BYTES * model.num_parameters(only_trainable=True)
        needed *= 1 + is_before_decay
        writer = self.checkpoints if self.is_world_process_zero() else None
        with self.pause():
            if writer is not None and not writer.is_ready(step, needed):
                writer = None
            progress = self.guard.state() | {"is_unscored": self.is_unscored}
            state = copy_state(self, writer is not None, progress)
            if writer is not None:
                writer.start_writing(step, state, is_before_decay)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation set; log the sources before and after training only.

        The Trainer's own loop averages the means of batches, which depend on the batch size and
        on the rows it repeats so that every process has as many.
        """
        if self.validation is None:
            return {}
        with self.pause(), torch.no_grad():
            metrics = self._score(self.validation)
        model: Any = self.model
        model.train()  # not in every micro-batch: it visits all modules
        self.is_unscored = metrics is None
        if metrics is None:
            self.stop(self.control)
            return {}
        if self.state.global_step not in (0, self.state.max_steps):
            metrics = {k: v for k, v in metrics.items() if not k.startswith(SOURCE)}
        self.log(metrics)
        warn_of_rise(self.state.log_history)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _score(self, validation: Validation) -> dict[str, float] | None:
        """Score the rows, divided among the processes, and sum the losses by source.

        Returns None as soon as a process has received a signal to stop.
        """
        model: Any = self.model
        model.eval()
        # For each source: the sum of its tokens' losses, and their number.
        sums = torch.zeros(2, len(validation.titles), dtype=torch.float64, device=self.args.device)
        rows, size = validation.rows, self.args.per_device_eval_batch_size
        stride = size * self.args.world_size
        bar = tqdm(
            range(0, len(rows), stride),
            "scoring",
            unit=" batches",
            leave=False,
            delay=1,  # seconds before it appears
            disable=not self.is_world_process_zero(),
        )
        for start in bar:
            self.watchdog.progress()
            signals = torch.tensor(float(self.signal_seen), device=self.args.device)
            self.should_stop |= self.accelerator.reduce(signals, reduction="sum").item() > 0
            if self.should_stop:
                return None
            first = start + size * self.args.process_index
            chunk = [rows[i] for i in range(first, min(first + size, len(rows)))]
            if not chunk:
                continue  # the other processes have the rest
            batch = self._prepare_inputs(self.collate(chunk))
            losses = model(**batch, reduction="none").loss.double()
            sources = token_sources(chunk, batch["labels"].shape[1]).flatten().to(losses.device)
            counted = torch.stack([losses, torch.ones_like(losses)])
            sums.index_add_(1, sources[batch["trained"] + 1], counted)
        nats, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        return validation.metrics(nats, tokens)


def warn_of_rise(history: History) -> None:
    """Warn if the validation loss has risen twice in a row."""
    losses = [entry[ALL_LOSS] for entry in history if ALL_LOSS in entry]
    if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
        log.warning(
            "the validation loss rises: %.4f, %.4f, %.4f: fewer --epochs or lower learning rates "
            "may give a better model",
            *losses[-3:],
        )
