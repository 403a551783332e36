"""Continued pretraining and fine-tuning: LoRA on the transformer, the embeddings in full, together.

Steps 5 and 6 are this one function on different data. It is transformers' Trainer with
  * a loss that never holds the logits of a batch (78,592 columns at 6B size),
  * the two embedding matrices trained in place: PEFT's `modules_to_save` would keep a frozen
    second copy of both,
  * a learning rate of their own for the embeddings,
and it runs as a plain process on one GPU or the CPU, or under torchrun with DeepSpeed ZeRO-2.

It can be stopped at any moment: SIGTERM and Ctrl-C save a checkpoint at the end of the step, a run
that is started again goes on from the newest whole one, and ends where an undisturbed run ends.
"""

import gc
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainingArguments, set_seed

from chatglm_ja.chatglm3 import base_config, chat_format, tensor_names, tokenizer
from chatglm_ja.chatglm3.loading import compute_dtype, load_glm
from chatglm_ja.chatglm3.model_files import weights_bytes
from chatglm_ja.chatglm3.weights import read_tensor
from chatglm_ja.cli import is_main_process
from chatglm_ja.data import dataset
from chatglm_ja.errors import ConfigError, DataError, StoppedError, UserError
from chatglm_ja.storage.output import Output
from chatglm_ja.training import (
    costs,
    loss_plot,
    merge_lora,
    new_rows,
    source_losses,
    training_state,
)
from chatglm_ja.training.checkpoints import Checkpoints, step_of
from chatglm_ja.training.merge_lora import ADAPTER
from chatglm_ja.training.model import GlmForTraining
from chatglm_ja.training.progress import Progress, tensorboard
from chatglm_ja.training.settings import TrainingConfig
from chatglm_ja.training.trainer import (
    EMBEDDINGS,
    MEASURED,
    ResumableTrainer,
    stopping_on_signals,
    stored_embeddings,
)
from chatglm_ja.training.validation import Validation
from chatglm_ja.training.watchdog import Watchdog

log = logging.getLogger(__name__)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
HISTORY_FILE = "history.json"
RUNTIME = "train_runtime"
# Rows from which the lengths of documents, and the share of trained tokens, are estimated.
SAMPLED_ROWS = 256


def choose_dtype(config: TrainingConfig) -> torch.dtype:
    """The dtype of the frozen weights and of the computation."""
    if config.precision != "auto":
        chosen = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        if config.precision == "fp16" and not torch.cuda.is_available():
            raise ConfigError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
        return chosen[config.precision]
    return compute_dtype()


def load_for_training(config: TrainingConfig, dtype: torch.dtype) -> PeftModel:
    """The model with LoRA matrices, and its embeddings trainable if the settings say so.

    What is trained is kept in float32 (under DeepSpeed in half precision, with float32 masters);
    the rest is frozen in `dtype`.
    """
    log.info("loading %s", config.model)
    model: Any = load_glm(config.model, GlmForTraining, dtype)
    if config.embedding_rows == "new":
        encoder = tokenizer.load_processor(config.model)
        new_rows.split_embeddings(model, chat_format.first_new_id(encoder))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(LORA_TARGETS),
    )
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if name.endswith(EMBEDDINGS):
            parameter.requires_grad_(config.train_embeddings)
        elif config.learning_rate == 0:
            parameter.requires_grad_(False)
    for name, rows in stored_embeddings(config.model, model):
        model.get_parameter(name).data = rows
    for module in model.modules():
        # Otherwise the LoRA layers make float32 copies of their inputs, for autocast to undo.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    if config.compile:
        # A layer at a time: they are alike, so that one compilation serves all.
        for layer in model.get_base_model().model.layers:
            layer.compile()
    return model


def train_and_publish(config: TrainingConfig, output: Output, name: str) -> None:
    """Train on the data set `name` (pretrain or sft) and publish adapter and merged model.

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
        # Sorted, as the lines of a run that was resumed are.
        text = json.dumps(_repeatable(history), indent=1, sort_keys=True)
        (working / HISTORY_FILE).write_text(text + "\n", encoding="utf-8")
        if sources:
            source_losses.write_source_losses(sources, history, working)
        fit = loss_plot.plot_losses(history, result["tokens_per_step"], working)
        if fit is not None:
            log.info("%s", fit.describe())
        gc.collect()  # the trainer and its callbacks hold each other, and all that was trained
        torch.cuda.empty_cache()
        log.info("merging the adapter")
        merge_lora.write_merged(config.model, working)
        if config.should_compare_logits(weights_bytes(config.model)):
            difference = merge_lora.verify_logits(config.model, working)
            log.info("logits of merged and adapted model agree to %.1e", difference)
        output.counts.update(result, speed=_speed(history))
    log.info("trained model: %s", config.output_dir)


def train(
    config: TrainingConfig,
    name: str,
    output_dir: Path | None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train and write `output_dir`/adapter, on the rank that is given an `output_dir`.

    With `checkpoints` the run goes on from the newest of them, and adds to them. Returns the loss
    history and counts. Raises DataError when the data does not fit the model, StoppedError when a
    signal ended the run, and LostError when another process of it ended.
    """

    def advice() -> str:
        return "start it again" if checkpoints is None else checkpoints.describe_resume()

    with Watchdog(config.stall_seconds, advice) as watch:
        return _train(config, name, output_dir, checkpoints, watch)


def _train(
    config: TrainingConfig,
    name: str,
    output_dir: Path | None,
    checkpoints: Checkpoints | None,
    watch: Watchdog,
) -> dict[str, Any]:
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed, which the Trainer imports, warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if config.deepspeed is not None:
            _build_no_kernel()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    plan = costs.BatchPlan.of(config, world_size)
    shape = base_config.read_shape(config.model)
    train_set, validation = _read_data(config, name, shape)
    dtype = choose_dtype(config)
    # PEFT and the Trainer draw from the global generators: the same seed on every rank.
    set_seed(config.seed)
    arguments = _trainer_arguments(config, plan, dtype, output_dir)
    found = None if checkpoints is None else _newest(checkpoints, config.overwrite)
    if found is not None:
        log.info("going on from %s", found)
        arguments.eval_on_start = False
    model = load_for_training(config, dtype)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens_per_step = config.global_batch_size * dataset.count_tokens(train_set) // len(train_set)
    log.info(
        "training %.2f M of %.2f M parameters on %d rows, %s = %d rows or about %s tokens a step",
        trained / 1e6,
        model.num_parameters() / 1e6,
        len(train_set),
        plan,
        config.global_batch_size,
        f"{tokens_per_step:,}",
    )
    _say_what_is_lost(config, plan, len(train_set))
    scored, sources = None, []
    if config.evaluations:
        scored = Validation.of(
            validation, config.data, name, tokenizer.load_processor(config.model)
        )
        if name == "sft":
            sources = dataset.count_sources(train_set, scored.titles)
    trainer = ResumableTrainer(
        config,
        model,
        scored,
        checkpoints,
        watch,
        tokens_per_step,
        _flops_per_token(config, shape, train_set),
        args=arguments,
        train_dataset=train_set,
    )
    progress = Progress(trainer, sources)
    trainer.add_callback(progress)
    if config.tracker == "tensorboard" and output_dir is not None:
        folder = config.output_dir.with_name(config.output_dir.name + ".tensorboard")
        trainer.add_callback(tensorboard(folder, None if found is None else step_of(found)))
    trainer.remove_callback(PrinterCallback)
    with stopping_on_signals(trainer), progress:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if trainer.should_stop and trainer.state.global_step < trainer.state.max_steps:
        raise StoppedError(
            f"at step {trainer.state.global_step} of {trainer.state.max_steps}: {watch.advice()}"
        )
    weights = training_state.trained_weights(trainer, output_dir is not None)
    if output_dir is not None:
        _save_adapter(config, trainer.accelerator.unwrap_model(trainer.model_wrapped), weights,
                      output_dir / ADAPTER)  # fmt: skip
    trainer.accelerator.free_memory()  # DeepSpeed's engine is held by others too
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {
        "trained_parameters": trained,
        "steps": trainer.state.global_step,
        "tokens_per_step": tokens_per_step,
        "world_size": world_size,
        "history": trainer.state.log_history,
        "sources": sources,
    }


def _say_what_is_lost(config: TrainingConfig, plan: costs.BatchPlan, rows: int) -> None:
    """On the way of the gradients, and of the data."""
    if plan.accumulation > 1 and config.deepspeed is not None:
        log.info(
            "ZeRO-2 sends the gradients %d times a step, once a pass: a larger --micro-batch-size "
            "or more GPUs make it fewer",
            plan.accumulation,
        )
    if left_over := rows % config.global_batch_size:
        log.info("rows of an epoch that fill no step and are left out: %d", left_over)


def _flops_per_token(config: TrainingConfig, shape: base_config.ModelShape, rows: Any) -> float:
    """Operations of a trained token, by the lengths of the documents in the first rows."""
    lengths = rows.select(range(min(SAMPLED_ROWS, len(rows))))["lengths"]
    if not config.document_mask:
        lengths = [[sum(of_row)] for of_row in lengths]
    return costs.flops_per_token(
        shape,
        costs.trained_parameters(shape, config),
        costs.mean_context(lengths),
        dataset.scored_share(rows, SAMPLED_ROWS),
    )


def _build_no_kernel() -> None:
    """Keep DeepSpeed from compiling its kernel for sums in shared memory at the start of a run on
    the CPU: killed meanwhile, it leaves a lock for which every later run would wait, for ever."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _save_adapter(
    config: TrainingConfig, model: Any, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write what was trained, in float32, in PEFT's format. DeepSpeed's model is a rounded copy."""
    for name, value in weights.items():
        model.get_parameter(name).data = value
    if config.embedding_rows == "new":
        names = tensor_names.GLM_EMBEDDINGS
        new_rows.join_embeddings(
            model.get_base_model(), *(read_tensor(config.model, name) for name in names)
        )
    # Its name alone: where it lies on this machine means nothing elsewhere.
    model.peft_config["default"].base_model_name_or_path = config.model.resolve().name
    model.save_pretrained(folder, save_embedding_layers=config.train_embeddings)
    (folder / "README.md").unlink()  # PEFT's form for a model card, which nobody has filled in


def _read_data(config: TrainingConfig, name: str, shape: base_config.ModelShape) -> tuple[Any, Any]:
    """The rows to train on and to score; raises DataError when they do not fit."""
    train_set = dataset.load_rows(config.data, name, "train")
    validation = dataset.load_rows(config.data, name, "validation")
    encoder = tokenizer.load_processor(config.model) if name == "sft" else None
    for split, rows in (("train", train_set), ("validation", validation)):
        dataset.check_rows(rows, config.block_size, shape, config.data, name)
        if encoder is not None:
            dataset.check_conversations(rows, config.data, split, encoder)
    if config.evaluations and not len(validation):
        raise DataError(
            f"{config.data} has no validation rows of {name}: prepare some, or pass --evaluations 0"
        )
    if not config.packing:
        train_set, validation = dataset.unpack_rows(train_set), dataset.unpack_rows(validation)
    if len(train_set) < config.global_batch_size:
        raise DataError(
            f"the data has {len(train_set)} rows, but a step takes {config.global_batch_size}: "
            "lower --global-batch-size or prepare more data"
        )
    return train_set, validation


def _trainer_arguments(
    config: TrainingConfig, plan: costs.BatchPlan, dtype: torch.dtype, output_dir: Path | None
) -> TrainingArguments:
    """The settings in the Trainer's words."""
    arguments = TrainingArguments(
        # The Trainer makes this folder and, as nothing is saved through it, leaves it empty.
        output_dir=str(output_dir or tempfile.gettempdir()),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=plan.micro_batch,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=str(config.deepspeed) if config.deepspeed else None,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.evaluations else "no",
        # A share of all steps. The last step is scored anyway: one evaluation is no share, but
        # a step that never comes.
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
        # Without torchrun the Trainer would spread the batch over all GPUs with DataParallel.
        arguments._n_gpu = 1
    return arguments


def _newest(checkpoints: Checkpoints, overwrite: bool) -> Path | None:
    """The checkpoint to resume from: rank 0 looks, so that all ranks take the same."""
    found: list[Any] = [None, None]
    if is_main_process():
        try:
            found[0] = checkpoints.find_newest(overwrite)
        except UserError as error:
            found[1] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _repeatable(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The log less what another run measures otherwise: the same weights have the same history."""
    lines = [entry for entry in history if RUNTIME not in entry]
    return [{k: v for k, v in entry.items() if k not in MEASURED} for entry in lines]


def _speed(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds since this process began to train, and the medians of what its lines measured."""
    speed = {"seconds": next(entry[RUNTIME] for entry in history if RUNTIME in entry)}
    for name in MEASURED:
        values = [entry[name] for entry in history if name in entry]
        if values:
            speed[name] = round(statistics.median(values), 4)
    return speed


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The Trainer's log of a folder that `train_and_publish` made."""
    return json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
