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

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GlmForCausalLM,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from chatglm_ja import chat, dataset, export, loss_curves, new_rows, tokenizer
from chatglm_ja.artifacts import Output
from chatglm_ja.checkpoint import load_glm
from chatglm_ja.checkpoints import Checkpoints
from chatglm_ja.cli import is_main_process
from chatglm_ja.config import TrainingConfig
from chatglm_ja.errors import ConfigError, DataError, StoppedError, UserError
from chatglm_ja.model import GlmForTraining, compute_dtype
from chatglm_ja.trainer import EMBEDDINGS, Progress, ResumableTrainer, stopping_on_signals

log = logging.getLogger(__name__)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
ADAPTER = "adapter"
HISTORY_FILE = "history.json"


def precision(config: TrainingConfig) -> torch.dtype:
    """The dtype of the frozen weights and of the computation."""
    if config.precision != "auto":
        chosen = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        if config.precision == "fp16" and not torch.cuda.is_available():
            raise ConfigError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
        return chosen[config.precision]
    return compute_dtype()


def load_for_training(config: TrainingConfig, dtype: torch.dtype) -> PeftModel:
    """The model with LoRA matrices, and its embeddings trainable if the settings say so.

    What is trained is kept in float32 (under DeepSpeed bf16, with float32 masters); the rest is
    frozen in `dtype`.
    """
    log.info("loading %s", config.model)
    model: Any = load_glm(config.model, GlmForTraining, dtype)
    if config.embedding_rows == "new":
        encoder = tokenizer.load(config.model)
        new_rows.split(model, chat.special_id(encoder, tokenizer.SPECIAL_TOKENS[-1]) + 1)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(LORA_TARGETS),
    )
    model = get_peft_model(model, lora)
    if config.train_embeddings:
        for name, parameter in model.named_parameters():
            if name.endswith(EMBEDDINGS):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
    return model


def train_and_publish(config: TrainingConfig, output: Output, name: str) -> None:
    """Train on the data set `name` (pretrain or sft) and publish adapter and merged model.

    Every process of a torchrun job calls this; rank 0 writes and publishes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    # How a step's rows are divided over passes and processes makes no other run of it.
    divided = ("micro_batch_size", "gradient_accumulation")
    run = {k: v for k, v in output.arguments.items() if k not in divided}
    run["rows_per_step"] = config.micro_batch_size * config.gradient_accumulation * world_size
    folder = config.output_dir.with_name(config.output_dir.name + ".checkpoints")
    checkpoints = Checkpoints(folder, run | output.lineage, config.keep_checkpoints)
    if not is_main_process():
        train(config, name, None, checkpoints)
        return
    with output.write() as folder:
        result = train(config, name, folder, checkpoints)
        history = result.pop("history")
        text = json.dumps(history, indent=1)
        (folder / HISTORY_FILE).write_text(text + "\n", encoding="utf-8")
        fit = loss_curves.write(history, result["tokens_per_step"], folder)
        if fit is not None:
            log.info("%s", fit.describe())
        write_merged(config.model, folder)
        output.counts.update(result)
    checkpoints.remove()
    log.info("trained model: %s", config.output_dir)


def train(
    config: TrainingConfig,
    name: str,
    output_dir: Path | None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Any]:
    """Train and write `output_dir`/adapter, on the rank that is given an `output_dir`.

    With `checkpoints` the run goes on from the newest of them, and adds to them. Returns the loss
    history and counts. Raises DataError when the data does not fit the model, and StoppedError
    when a signal ended the run.
    """
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed, which the Trainer imports, warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    train_set = dataset.read(config.data, name, "train")
    validation = dataset.read(config.data, name, "validation")
    dtype = precision(config)
    # PEFT and the Trainer draw from the global generators: the same seed on every rank.
    set_seed(config.seed)
    arguments = _trainer_arguments(config, dtype, output_dir, has_validation=len(validation) > 0)
    found = None if checkpoints is None else _newest(checkpoints, config.overwrite)
    if found is not None:
        log.info("going on from %s", found)
        arguments.eval_on_start = False
    model = load_for_training(config, dtype)
    _check_ids(train_set, model.config.vocab_size)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows_per_step = config.micro_batch_size * config.gradient_accumulation * arguments.world_size
    if len(train_set) < rows_per_step:
        raise DataError(
            f"the data has {len(train_set)} rows, but a step takes {rows_per_step} (micro-batch x "
            "accumulation x processes): lower --micro-batch-size or prepare more data"
        )
    sample = train_set.select(range(min(64, len(train_set))))["lengths"]
    tokens_per_step = rows_per_step * sum(map(sum, sample)) // len(sample)
    log.info(
        "training %.2f M of %.2f M parameters on %d rows, %d rows or about %s tokens a step",
        trained / 1e6,
        model.num_parameters() / 1e6,
        len(train_set),
        rows_per_step,
        f"{tokens_per_step:,}",
    )
    if left_over := len(train_set) % (config.micro_batch_size * arguments.world_size):
        log.info("every epoch leaves out %d rows, which fill no batch", left_over)
    languages = _by_language(validation)
    encoder = tokenizer.load(config.model)
    trainer = ResumableTrainer(
        config,
        model,
        languages,
        checkpoints,
        # Of conversations only the answers are scored, of texts everything.
        {
            language: dataset.count_characters(rows, encoder)
            for language, rows in languages.items()
            if "labels" not in rows.column_names
        },
        args=arguments,
        train_dataset=train_set,
    )
    progress = Progress(trainer, tokens_per_step)
    trainer.add_callback(progress)
    trainer.remove_callback(PrinterCallback)
    with stopping_on_signals(trainer), progress:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if trainer.should_stop and trainer.state.global_step < trainer.state.max_steps:
        raise StoppedError(
            f"at step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved: "
            "the same command goes on from it"
        )
    if output_dir is not None:
        learned = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        new_rows.join(learned.get_base_model())
        learned.save_pretrained(output_dir / ADAPTER, save_embedding_layers=config.train_embeddings)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {
        "trained_parameters": trained,
        "steps": trainer.state.global_step,
        "tokens_per_step": tokens_per_step,
        "world_size": arguments.world_size,
        "history": trainer.state.log_history,
    }


def _trainer_arguments(
    config: TrainingConfig, dtype: torch.dtype, output_dir: Path | None, has_validation: bool
) -> TrainingArguments:
    """The settings in the Trainer's words."""
    arguments = TrainingArguments(
        # The Trainer makes this folder and, as nothing is saved through it, leaves it empty.
        output_dir=str(output_dir or tempfile.gettempdir()),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
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
        eval_strategy="steps" if has_validation else "no",
        eval_steps=1 / config.evaluations,
        eval_on_start=has_validation,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # An incomplete last batch would be filled up with rows of the first on several ranks.
        dataloader_drop_last=True,
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
            found[0] = checkpoints.start(overwrite)
        except UserError as error:
            found[1] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _by_language(validation: Any) -> dict[str, Any]:
    """The validation rows, one data set per language where the rows say their language."""
    if not len(validation):
        return {}
    if "language" not in validation.column_names:
        return {"all": validation}
    languages = validation["language"]
    return {
        language: validation.select([i for i, other in enumerate(languages) if other == language])
        for language in dict.fromkeys(languages)
    }


def _check_ids(rows: Any, vocab_size: int) -> None:
    """The data must have been made with the model's tokenizer: ids within its rows."""
    largest = dataset.largest_id(rows)
    if largest >= vocab_size:
        raise DataError(
            f"the data holds token id {largest}, but the model has {vocab_size} embedding rows: "
            "prepare the data and resize the model with the same tokenizer"
        )


def write_merged(model_dir: Path, output_dir: Path) -> None:
    """Merge `output_dir`/adapter into the model of `model_dir` and write it to `output_dir`.

    The adapter is read back from the disk, so what is merged is what was saved; the model's
    stored dtype is kept. The folder loads with plain `AutoModelForCausalLM` and `AutoTokenizer`.
    """
    log.info("merging the adapter")
    model = load_glm(model_dir, GlmForCausalLM, "auto")
    merged = PeftModel.from_pretrained(model, output_dir / ADAPTER).merge_and_unload()
    merged.save_pretrained(output_dir, max_shard_size="2GB")
    export.copy_files(model_dir, output_dir)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The Trainer's log of a folder that `train_and_publish` made."""
    return json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
