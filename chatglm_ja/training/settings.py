"""Settings of steps 5 and 6."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_ja.chatglm3 import base_config
from chatglm_ja.chatglm3.model_files import weights_bytes
from chatglm_ja.errors import ConfigError
from chatglm_ja.settings import REPORTS_BYTES, StepConfig, setting
from chatglm_ja.storage.files import read_json


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StepConfig):
    """Steps 5 and 6: LoRA on the transformer, and the embeddings in full, together."""

    model: Path = setting("model folder to start from")
    data: Path = setting("output folder of step 4")
    block_size: int = setting(
        "tokens of a row, as step 4 prepared the data",
        1024,
        low=8,
        high=2**20,
        affects_result=False,
    )
    train_embeddings: bool = setting("train the input and output embeddings in full", True)
    embedding_rows: Literal["all", "new"] = setting(
        "which rows of the embeddings are trained; new: those of the added pieces only, with a "
        "sixth of the gradients and moments at 6B size",
        "all",
    )
    lora_rank: int = setting("rank of the LoRA matrices", 8, low=1)
    lora_alpha: int = setting("LoRA scale: the update is multiplied by alpha / rank", 16, low=0)
    lora_dropout: float = setting("dropout before the LoRA matrices", 0.0, low=0, high=0.9)
    learning_rate: float = setting(
        "peak learning rate of the LoRA matrices (0: the transformer stays as it is)",
        2e-4,
        low=0,
        high=1,
    )
    embedding_learning_rate: float = setting(
        "peak learning rate of the embeddings", 5e-5, low=0, high=1
    )
    warmup_ratio: float = setting("share of the steps with a rising rate", 0.03, low=0, high=0.9)
    weight_decay: float = setting("AdamW weight decay of the LoRA matrices", 0.0, low=0, high=1)
    max_grad_norm: float = setting("gradient clipping", 1.0, low=0)
    epochs: float = setting("passes over the data", 1.0, low=0, high=1e6)
    max_steps: int = setting("stop after this many optimizer steps (-1: --epochs)", -1, low=-1)
    global_batch_size: int = setting(
        "blocks per optimizer step, whatever the number of processes: they share them out",
        16,
        low=1,
    )
    micro_batch_size: int = setting(
        "at most so many blocks per forward pass and process; what is left of its share of the "
        "global batch is accumulated, at the price of more gradient traffic under ZeRO-2",
        4,
        low=1,
        affects_result=False,
    )
    packing: bool = setting(
        "train on packed rows, as step 4 made them; without, every document or conversation is a "
        "row, padded to the longest of its batch: slower, and the same losses",
        True,
    )
    document_mask: bool = setting(
        "restart positions and keep attention inside each document of a block", True
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto: bf16 where the GPU has it, else fp16; fp32 on a CPU", "auto"
    )
    gradient_checkpointing: bool = setting(
        "recompute activations: less memory, a third more time", False, affects_result=False
    )
    compile: bool = setting(
        "compile the layers with torch.compile: a later start, then faster on a GPU",
        False,
        affects_result=False,
    )
    deepspeed: Path | None = setting("DeepSpeed configuration file, as ds_zero2.json", None)
    estimate: int | None = setting(
        "print what training on so many GPUs takes in memory on each of them, and stop",
        None,
        low=1,
        affects_result=False,
    )
    evaluations: int = setting(
        "how often to score the validation set, evenly spaced and besides step 0 (0: never)",
        10,
        low=0,
        affects_result=False,
    )
    tracker: Literal["tensorboard", "wandb", "none"] = setting(
        "where the curves go while training: tensorboard: <output_dir>.tensorboard/; wandb: "
        "Weights & Biases, which is not among the requirements",
        "tensorboard",
        affects_result=False,
    )
    logging_steps: int = setting(
        "steps between two progress lines", 10, low=1, affects_result=False
    )
    save_steps: int = setting(
        "steps between two checkpoints, from which a run that was stopped or killed goes on",
        200,
        low=1,
        affects_result=False,
    )
    keep_checkpoints: int = setting("checkpoints to keep", 2, low=1, affects_result=False)
    stall_seconds: float = setting(
        "with several processes: end the run when one has made no progress for so long, as it "
        "waits for another; rank 0 writes a checkpoint in less",
        600.0,
        low=1,
        affects_result=False,
    )
    max_loss_jump: float = setting(
        "skip a step with a pass whose loss is more than this many times the lowest mean of 20 "
        "passes in a row, or, before there are as many, the largest one",
        3.0,
        low=1,
    )
    max_skipped_steps: int = setting(
        "stop when so many steps in a row were skipped, for a jump or a loss that is no number",
        5,
        low=1,
    )
    seed: int = setting("seed of the LoRA matrices and the order of the blocks", 42, low=0)

    def check_rows(self, prepared: int) -> None:
        """Raises ConfigError when the data was prepared with rows of another size."""
        if prepared != self.block_size:
            raise ConfigError(
                f"{self.data} has rows of {prepared} tokens, but --block-size is "
                f"{self.block_size}: prepare the data with that size, or set it to the data's"
            )

    def contradictions(self) -> list[str]:
        problems = []
        if self.deepspeed is not None:
            problems += _deepspeed_problems(self.deepspeed)
        if self.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
            problems.append("--tracker wandb needs its package: run `pip install wandb`")
        if self.embedding_rows == "new" and not self.train_embeddings:
            problems.append(
                "--embedding-rows new trains embeddings: leave out --no-train-embeddings"
            )
        if self.learning_rate == 0 and not self.train_embeddings:
            problems.append("--learning-rate 0 and --no-train-embeddings leave nothing to train")
        problems += _unshared(self.global_batch_size, self.estimate)
        if self.max_steps == 0 or (self.max_steps < 0 and self.epochs == 0):
            problems.append("--max-steps and --epochs leave nothing to train")
        return problems

    def disk_bytes(self) -> int:
        """Estimate the size of checkpoints (one more than are kept), adapter and merged model."""
        from chatglm_ja.training import costs

        trained = costs.trained_parameters(base_config.read_shape(self.model), self).all
        checkpoints = costs.CHECKPOINT_BYTES * trained * (self.keep_checkpoints + 1)
        adapter = costs.WEIGHT_BYTES * trained
        return REPORTS_BYTES + checkpoints + adapter + weights_bytes(self.model)


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Step 6."""

    samples: int = setting(
        "answers to validation questions of each kind that are shown at the end, greedy and "
        "sampled (0: none)",
        5,
        low=0,
        affects_result=False,
    )
    max_new_tokens: int = setting(
        "longest of these answers in tokens", 256, low=1, affects_result=False
    )


def _unshared(batch: int, processes: int | None) -> list[str]:
    """Why the processes, by default those of torchrun, cannot share a global batch; or nothing."""
    count = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if batch % count == 0:
        return []
    return [
        f"--global-batch-size {batch} cannot be shared evenly by {count} processes: choose a "
        f"multiple of {count}"
    ]


def _deepspeed_problems(path: Path) -> list[str]:
    """What is wrong with a DeepSpeed configuration; one sentence each."""
    try:
        stage = read_json(path)["zero_optimization"]["stage"]
    except OSError:
        return [f"--deepspeed {path} not found"]
    except ValueError as error:
        return [f"--deepspeed {path} is not JSON ({error})"]
    except (KeyError, TypeError):
        return [f"--deepspeed {path} names no ZeRO stage: expected 2, as ds_zero2.json"]
    if stage == 3:
        # huggingface/peft#2450, deepspeedai/DeepSpeed#7669
        return [
            f"--deepspeed {path} asks for ZeRO stage 3, which shares out the weights too: with it, "
            "fully trained embeddings have been saved as empty tensors; use ds_zero2.json"
        ]
    return []
