"""Continued pretraining and fine-tuning: LoRA on the transformer, and the embeddings in full.

Steps 5 and 6 are this one program on different data. It is transformers' Trainer (trainer.py) with
a loss that never holds the logits of a batch (model.py), on the model that adapter.py builds. It
runs as a plain process on one GPU or the CPU, or under torchrun with DeepSpeed ZeRO-2.

A run can be stopped at any moment: SIGTERM and Ctrl-C save a checkpoint after the current step. A
resumed run starts from the newest intact checkpoint; its weights are byte-identical.
"""

import gc
import logging
import os
import statistics
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments, set_seed

from chatglm_ja.bases import families
from chatglm_ja.cli import is_main_process
from chatglm_ja.data import dataset
from chatglm_ja.errors import StoppedError, UserError
from chatglm_ja.storage.files import write_json
from chatglm_ja.storage.output import Output
from chatglm_ja.storage.weight_files import weights_bytes
from chatglm_ja.training import adapter, costs
from chatglm_ja.training.checkpoints import Checkpoints, gather_tensors, step_of
from chatglm_ja.training.progress import Progress, make_tensorboard_callback, plot_losses
from chatglm_ja.training.rows import make_sampler, open_rows
from chatglm_ja.training.settings import TrainingConfig
from chatglm_ja.training.stopping import stopping_on_signals
from chatglm_ja.training.trainer import MEASURED, ResumableTrainer
from chatglm_ja.training.validation import SOURCES_FILE, Validation, losses_by_source
from chatglm_ja.training.watchdog import Watchdog

log = logging.getLogger(__name__)

HISTORY_FILE = "history.json"
RUNTIME = "train_runtime"


def train_and_publish(config: TrainingConfig, output: Output, name: str) -> None:
    """Train on the data set `name` (pretrain or sft); publish the adapter and the merged model.

    Every process of a torchrun job calls this; rank 0 writes and publishes.
    """
    run = output.arguments | output.lineage
    checkpoints = Checkpoints(output.unfinished, run, config.keep_checkpoints)
    if not is_main_process():
        train(config, name, None, checkpoints)
        return
    with output.write() as working:
        result = train(config, name, working, checkpoints)
        history, sources = result.pop("history"), result.pop("sources")
        # Speed, memory and times differ between two runs with the same weights.
        runtime = next(entry[RUNTIME] for entry in history if RUNTIME in entry)
        losses = [
            {key: value for key, value in entry.items() if key not in MEASURED}
            for entry in history
            if RUNTIME not in entry
        ]
        # Sorted, because entries read back from a checkpoint are.
        write_json(working / HISTORY_FILE, losses, sort_keys=True)
        if sources:
            write_json(working / SOURCES_FILE, losses_by_source(sources, history))
        plot_losses(history, result["tokens_per_step"], working)
        gc.collect()  # frees the trainer and its callbacks, a reference cycle that holds the model
        torch.cuda.empty_cache()
        log.info("merging the adapter")
        output.records = adapter.write_merged(config.model, working)
        if config.should_compare_logits(weights_bytes(config.model)):
            difference = adapter.verify_logits(config.model, working)
            log.info("logits of merged and adapted model agree to %.1e", difference)
        speed = {"seconds": runtime}
        for key in MEASURED:
            if values := [entry[key] for entry in history if key in entry]:
                speed[key] = round(statistics.median(values), 4)
        output.counts.update(result, speed=speed)
    log.info("trained model: %s", config.output_dir)


def train(
    config: TrainingConfig,
    name: str,
    output_dir: Path | None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train, and write `output_dir`/adapter on the rank that is given an `output_dir`.

    With `checkpoints` the run resumes from the newest of them and adds to them. Returns the loss
    history and counts. Raises DataError if the data does not fit the model, StoppedError if a
    signal ended the run, and LostError if another process of it ended.
    """
    describe_resume = checkpoints.describe_resume if checkpoints else lambda: "re-run the command"
    with Watchdog(config.stall_seconds, describe_resume) as watchdog:
        _prepare_for_cpu(config)
        own_rows, validation_rows = open_rows(config, name)
        validation, sources = None, []
        if config.evaluations:
            tokenizer = families.load_tokenizer(config.model)
            validation = Validation.prepare(validation_rows, config.data, name, tokenizer)
            if name == "sft":
                sources = dataset.count_sources(own_rows, validation.titles)
        rows, sampler = make_sampler(config, own_rows)
        # PEFT and the Trainer use the global generators: the same seed on every rank.
        set_seed(config.seed)
        arguments = _make_arguments(config, output_dir)
        resumed = None if checkpoints is None else _find_newest(checkpoints, config.overwrite)
        if resumed is not None:
            log.info("resuming from %s", resumed)
        elif config.continue_from is not None:
            log.info("continuing the constant phase of %s", config.continue_from)
        dtype = adapter.choose_dtype(config)
        model = adapter.load_for_training(config, dtype, arguments.device)
        trainer = ResumableTrainer(
            config, model, rows, sampler, validation, checkpoints, watchdog, arguments
        )
        _log_plan(trainer)
        progress = Progress(trainer, sources)
        trainer.add_callback(progress)
        if config.tracker == "tensorboard" and output_dir is not None:
            folder = config.output_dir.with_name(config.output_dir.name + ".tensorboard")
            step = None if resumed is None else step_of(resumed)
            trainer.add_callback(make_tensorboard_callback(folder, step))
        trainer.remove_callback(PrinterCallback)
        with stopping_on_signals(trainer), closing(progress):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
            if checkpoints is not None:
                checkpoints.wait()
        step, last_step = trainer.state.global_step, trainer.state.max_steps
        if trainer.should_stop:
            raise StoppedError(f"at step {step} of {last_step}: {describe_resume()}")
        return _finish(trainer, output_dir) | {"sources": sources}


def _log_plan(trainer: ResumableTrainer) -> None:
    """Log what is trained, and how a global batch is divided."""
    config = trainer.config
    model: Any = trainer.model
    plan = costs.BatchPlan.divide(config, trainer.args.world_size)
    log.info(
        "training %.2f M of %.2f M parameters on %d rows, %s = %d rows or about %s tokens a step",
        model.num_parameters(only_trainable=True) / 1e6,
        model.num_parameters() / 1e6,
        trainer.sampler.rows,
        plan,
        config.global_batch_size,
        f"{trainer.tokens_per_step:,}",
    )
    if trainer.sampler.dropped:
        log.info("dropping %d rows per epoch (incomplete global batch)", trainer.sampler.dropped)


def _finish(trainer: ResumableTrainer, output_dir: Path | None) -> dict[str, Any]:
    """Write the adapter on the rank with an `output_dir`, free memory, and return the counts."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trained_parameters = model.num_parameters(only_trainable=True)  # save_adapter changes the model
    weights = gather_tensors(trainer, output_dir is not None)
    if output_dir is not None:
        adapter.save_adapter(trainer.config, model, weights, output_dir / adapter.ADAPTER)
    trainer.accelerator.free_memory()  # DeepSpeed's engine has other references
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {
        "trained_parameters": trained_parameters,
        "steps": trainer.state.global_step,
        "tokens_per_step": trainer.tokens_per_step,
        "world_size": trainer.args.world_size,
        "history": trainer.state.log_history,
    }


def _prepare_for_cpu(config: TrainingConfig) -> None:
    """Keep DeepSpeed from looking for a GPU, and from compiling a kernel, in a run on the CPU."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found no GPU
    if config.deepspeed is not None:
        import deepspeed

        # If the run is killed while DeepSpeed compiles this kernel for sums in shared memory, a
        # lock is left behind, for which every later run would wait forever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _make_arguments(config: TrainingConfig, output_dir: Path | None) -> TrainingArguments:
    """Translate the settings into the Trainer's."""
    plan = costs.BatchPlan.divide(config, int(os.environ.get("WORLD_SIZE", "1")))
    dtype = adapter.choose_dtype(config)
    arguments = TrainingArguments(
        # The Trainer creates this folder and leaves it empty, as nothing is saved through it.
        output_dir=str(output_dir or tempfile.gettempdir()),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=plan.micro_batch,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=0 if config.continue_from else config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # from pinned memory
        deepspeed=str(config.deepspeed) if config.deepspeed else None,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.evaluations else "no",
        # A fraction of all steps. The last step is always scored; a single evaluation is only that.
        eval_steps=1 / config.evaluations if config.evaluations > 1 else 10**9,
        eval_on_start=config.evaluations > 0,
        save_strategy="no",
        report_to="wandb" if config.tracker == "wandb" else "none",
        run_name=config.output_dir.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        # Without torchrun the Trainer would use all GPUs, with DataParallel.
        arguments._n_gpu = 1
    return arguments


def _find_newest(checkpoints: Checkpoints, overwrite: bool) -> Path | None:
    """Return the checkpoint to resume from; rank 0 looks, so that all ranks use the same one."""
    answer: list[Any] = [None, None]  # the path, an error
    if is_main_process():
        try:
            answer[0] = checkpoints.find_newest(overwrite)
        except UserError as error:
            answer[1] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
