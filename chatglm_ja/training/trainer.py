"""The Trainer of steps 5 and 6: transformers' own, with what they need beside.

* a learning rate of its own for the embeddings
* validation losses that are exact means per token (validation.py)
* a step whose loss is no number, or jumps, changes no weight on any process
* checkpoints that a run can be resumed from by another number of processes
* SIGTERM and Ctrl-C end the run after a checkpoint
"""

import logging
import math
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import RandomSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from chatglm_ja.chatglm3.chat_format import IGNORE_INDEX
from chatglm_ja.chatglm3.tensor_names import GLM_EMBEDDINGS
from chatglm_ja.chatglm3.weights import read_tensor
from chatglm_ja.training import collator, costs, training_state
from chatglm_ja.training.checkpoints import Checkpoints
from chatglm_ja.training.merge_lora import PEFT_PREFIX
from chatglm_ja.training.settings import TrainingConfig
from chatglm_ja.training.spikes import SpikeGuard
from chatglm_ja.training.validation import ALL_LOSS, SOURCE, Validation, token_sources
from chatglm_ja.training.watchdog import Watchdog

log = logging.getLogger(__name__)

# Names of the embeddings, whole or of their new rows only.
EMBEDDINGS = (*GLM_EMBEDDINGS, *(name.replace(".weight", ".new") for name in GLM_EMBEDDINGS))
SAME_SIGNAL_SECONDS = 3.0
# What `log` adds to a line of training.
MEASURED = ("tokens_per_second", "mfu", "memory_gb")


def stored_embeddings(folder: Path, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The embeddings that `model` trains as `folder` holds them, in float32, by parameter name.

    Those in a loaded model have been rounded to the dtype that it computes in.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(EMBEDDINGS) and parameter.requires_grad:
            stored = name.removeprefix(PEFT_PREFIX).removesuffix(".new").removesuffix(".weight")
            yield name, read_tensor(folder, f"{stored}.weight")[-len(parameter) :].float()


class ResumableTrainer(Trainer):
    """The Trainer with a learning rate of its own for the embeddings, exact validation, a guard
    against bad steps, and checkpoints that any number of processes can resume from."""

    def __init__(
        self,
        config: TrainingConfig,
        model: Any,
        validation: Validation | None,
        checkpoints: Checkpoints | None,
        watch: Watchdog,
        tokens_per_step: int,
        flops_per_token: float,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.validation = validation
        self.checkpoints = checkpoints
        self.watch = watch
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_tflops: float | None = None
        if torch.cuda.is_available():
            self.peak_tflops = costs.peak_tflops(torch.cuda.get_device_name())
        self.paused = 0.0  # seconds since the start that did not go into training
        self.last_logged = (time.monotonic(), 0)  # when, by a clock without pauses; step
        fixed = config.block_size if config.compile and config.packing else 0
        self.collate = collator.Collator(config.document_mask, fixed)
        self.guard = SpikeGuard(config.max_loss_jump, config.max_skipped_steps)
        self.last_norm = torch.zeros(())
        self.signal_seen = False  # by this process; `should_stop` is what all agree on
        self.should_stop = False
        # The Trainer wants an eval_dataset if it is to call `evaluate`.
        super().__init__(
            model,
            data_collator=self.collate,
            eval_dataset=None if validation is None else validation.rows,
            **kwargs,
        )

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward, unless the loss is no number or a jump: then the step is skipped
        on all processes, and the weights stay as they are."""
        self.watch.progress()
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        trained = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        # One exchange for all; the loss of a process is its share of the step's mean, times their
        # number.
        values = (
            loss.detach(),
            trained,
            num_items_in_batch,
            self.last_norm,
            float(self.signal_seen),
        )
        sums = torch.stack(
            [torch.as_tensor(v).to(loss.device, torch.float32, non_blocking=True) for v in values]
        )
        mean, trained_mean, item_count, norm, stop = self.accelerator.reduce(
            sums, reduction="mean"
        ).tolist()
        self.should_stop |= stop > 0
        step = self.state.global_step
        self.guard.judge_gradients(step, norm)
        # Per token of the pass alone, unless that is more than its share of the step: a pass of one
        # long answer has a large share, one of a short answer can have a large loss per token.
        tokens = trained_mean * self.args.world_size
        share = mean * self.current_gradient_accumulation_steps
        mean = min(mean * item_count / tokens, share) if tokens else 0.0
        if not self.guard.accepts(step + 1, mean, tokens > 0):
            self._drop_gradients(model)
            return torch.full_like(
                loss.detach(), self.guard.usual / self.current_gradient_accumulation_steps
            )
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)
        return loss.detach()

    def _drop_gradients(self, model: Any) -> None:
        """Those of this pass's step, of its earlier passes too."""
        model.zero_grad()
        if self.is_deepspeed_enabled:  # it sums them up beside the parameters
            zero: Any = self.optimizer.optimizer  # type: ignore[union-attr]
            for sums in (zero.averaged_gradients, zero.all_grad_tensors):
                for group in sums:
                    sums[group] = None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called before the optimizer's step: gradients that are no numbers must not reach it.

        The optimizer is told so on the device, as a GradScaler tells it, and the next pass reads
        the norm with its loss: the GPU is not waited for. In fp16 the scaler skips such steps,
        which are usual until the scale of the loss fits, and DeepSpeed does in any precision.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16:
            self.last_norm = torch.as_tensor(norm).detach()
            if not self.is_deepspeed_enabled:
                optimizer: Any = self.optimizer
                optimizer.optimizer.found_inf = (~self.last_norm.isfinite()).float()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the speed since the last line of training, MFU where the GPU is known, memory."""
        if "loss" in logs:
            now, step = time.monotonic() - self.paused, self.state.global_step
            then, last_step = self.last_logged
            speed = (step - last_step) * self.tokens_per_step / (now - then)
            self.last_logged = now, step
            logs["tokens_per_second"] = round(speed, 1)
            if self.peak_tflops is not None:
                rate = self.flops_per_token * speed / self.args.world_size
                logs["mfu"] = round(rate / (self.peak_tflops * 1e12), 4)
            logs["memory_gb"] = round(peak_memory_gb(), 3)
        super().log(logs, start_time)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count as time of training."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the GPU is still at belongs to training
        started = time.monotonic()
        try:
            yield
        finally:
            self.paused += time.monotonic() - started

    # The Trainer calls these with the folder of a checkpoint, which training_state.py reads.

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        pass

    def _prepare_for_training(self, max_steps: int, loader: Any, checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, loader, None)
        if checkpoint is not None:
            progress = training_state.load_state(self, Path(checkpoint))
            self.add_callback(_GoOn(self, progress))
        elif self.is_deepspeed_enabled:
            # Its float32 masters were made from half precision.
            stored = stored_embeddings(self.config.model, self.model)
            training_state.set_weights(self, dict(stored))
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        """All rows in random order, less what fills no step: then the steps of an epoch do not
        depend on how they are divided, and no process gets a row twice to have as many."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        whole = len(rows) - len(rows) % self.config.global_batch_size
        return RandomSampler(rows, num_samples=whole)

    def _load_rng_state(self, checkpoint: Any) -> None:
        if checkpoint is not None:
            training_state.load_random_states(self, Path(checkpoint))

    def _save_checkpoint(self, *_: Any) -> None:
        self.watch.progress()
        with self.pause():
            if self.checkpoints is not None and self.is_world_process_zero():
                size = training_state.state_bytes(self)
                with self.checkpoints.write(self.state.global_step, size) as folder:
                    training_state.save_state(self, folder, self.guard.state())
            else:
                training_state.save_state(self, None, self.guard.state())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        model = model or self.model
        if self.optimizer is None:
            lora: list[Any] = []
            embeddings: list[Any] = []
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    (embeddings if name.endswith(EMBEDDINGS) else lora).append(parameter)
            config = self.config
            groups: list[dict[str, Any]] = [
                {"params": lora, "lr": config.learning_rate, "weight_decay": config.weight_decay},
                # No decay: it would shrink the rows of tokens that do not occur in a batch.
                {"params": embeddings, "lr": config.embedding_learning_rate, "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        return self.optimizer

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Scores the validation set; the sources are logged before and after training only.

        The Trainer's own loop averages the means of batches, which depend on the batch size and
        on the rows that it repeats to give every process as many.
        """
        if self.validation is None:
            return {}
        with self.pause(), torch.no_grad():
            metrics = self._score(self.validation)
        if self.state.global_step not in (0, self.state.max_steps):
            metrics = {k: v for k, v in metrics.items() if not k.startswith(SOURCE)}
        self.log(metrics)
        _warn_of_a_rise(self.state.log_history)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _score(self, validation: Validation) -> dict[str, float]:
        """All processes share the rows."""
        model: Any = self.model
        model.eval()
        # Of every source the sum of its tokens' losses, and their number.
        sums = torch.zeros(2, len(validation.titles), dtype=torch.float64, device=self.args.device)
        rows = validation.rows
        size = self.args.per_device_eval_batch_size
        stride = size * self.args.world_size
        starts = range(size * self.args.process_index, len(rows), stride)
        bar = tqdm(
            starts,
            "scoring",
            unit=" batches",
            leave=False,
            delay=1,  # only where it takes longer than a second
            disable=not self.is_world_process_zero(),
        )
        for start in bar:
            self.watch.progress()
            chunk = [rows[i] for i in range(start, min(start + size, len(rows)))]
            batch = self._prepare_inputs(self.collate(chunk))
            losses = model(**batch, reduction="none").loss.double()
            trained = batch["labels"][:, 1:] != IGNORE_INDEX
            sources = token_sources(chunk, batch["labels"].shape[1])[:, 1:].to(trained.device)
            sums.index_add_(1, sources[trained], torch.stack([losses, torch.ones_like(losses)]))
        nats, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        return validation.metrics(nats, tokens)


def _warn_of_a_rise(history: Sequence[Mapping[str, Any]]) -> None:
    """Say so when the validation loss has risen twice in a row."""
    losses = [entry[ALL_LOSS] for entry in history if ALL_LOSS in entry]
    if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
        log.warning(
            "the validation loss rises: %.4f, %.4f, %.4f: fewer --epochs or lower learning rates "
            "may end at a better model",
            *losses[-3:],
        )


class _GoOn(TrainerCallback):
    """Restores what the Trainer resets before the first step of a resumed run."""

    def __init__(self, trainer: ResumableTrainer, progress: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.progress = progress

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._tr_loss += self.progress["loss_sum"]
        self.trainer._globalstep_last_logged = self.progress["last_logged"]
        self.trainer.guard.restore(self.progress)


@contextmanager
def stopping_on_signals(trainer: ResumableTrainer) -> Iterator[None]:
    """SIGTERM or SIGINT let the step end and be saved; a second one ends the process at once.

    What comes within SAME_SIGNAL_SECONDS is the same: Slurm signals the launcher and the processes
    that it passes signals on to.
    """
    seen_at = math.inf

    def note(number: int, _: Any) -> None:
        nonlocal seen_at
        if time.monotonic() > seen_at + SAME_SIGNAL_SECONDS:
            signal.signal(number, usual[number])
            signal.raise_signal(number)
        if not trainer.signal_seen:
            seen_at = time.monotonic()
            trainer.signal_seen = True
            log.info("%s: stopping after this step", signal.Signals(number).name)

    usual: dict[int, Any] = {
        number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def peak_memory_gb() -> float:
    """The most memory that was in use: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
