"""Settings of steps 5 and 6."""

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_ja.bases import families
from chatglm_ja.bases.shape import Linear, ModelShape, read_shape
from chatglm_ja.settings import REPORTS_BYTES, StepConfig, setting
from chatglm_ja.storage.files import read_json
from chatglm_ja.storage.weight_files import weights_bytes

WEIGHT_BYTES = 4  # trained weights are float32
CHECKPOINT_BYTES = 3 * WEIGHT_BYTES  # a trained weight and its two moments
# Settings that say what is trained, which a run shares with the one that it continues.
TRAINED_PARTS = (
    "train_embeddings", "embedding_rows", "lora_rank", "lora_alpha", "lora_targets", "optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: trained LoRA matrices, trained embeddings, and frozen ones."""

    lora: int
    embeddings: int
    frozen: int

    @property
    def all(self) -> int:
        """All trained parameters."""
        return self.lora + self.embeddings


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StepConfig):
    """Settings of step 5, which are also the first part of step 6's."""

    model: Path = setting("model folder to start from")
    data: Path = setting("output folder of step 4")
    continue_from: Path | None = setting(
        "output folder of a finished run of this step: continue its constant phase on --data, "
        "without warm-up, from the checkpoint before its decay (--decay-ratio)",
        None,
    )
    block_size: int = setting(
        "tokens per row, as prepared by step 4", 1024, low=8, high=2**20, affects_result=False
    )
    train_embeddings: bool = setting(
        "train the embeddings in full, the output matrix too if it is another", True
    )
    embedding_rows: Literal["all", "new"] = setting(
        "embedding rows to train; new: those of the added pieces only, which takes a sixth of the "
        "memory for gradients and moments at 6B size",
        "all",
    )
    lora_rank: int = setting("rank of the LoRA matrices", 8, low=1)
    lora_alpha: int = setting("LoRA scale: updates are multiplied by alpha / rank", 16, low=0)
    lora_targets: tuple[str, ...] = setting(
        "the linear layers that get LoRA matrices, by the last part of their names (q_proj, for "
        "example); by default all linear layers of the transformer",
        (),
    )
    lora_dropout: float = setting("dropout before the LoRA matrices", 0.0, low=0, high=0.9)
    learning_rate: float = setting(
        "peak learning rate of the LoRA matrices (0: freeze the transformer)", 2e-4, low=0, high=1
    )
    embedding_learning_rate: float = setting(
        "peak learning rate of the embeddings", 5e-5, low=0, high=1
    )
    warmup_ratio: float = setting("fraction of the steps for linear warm-up", 0.03, low=0, high=0.9)
    decay_ratio: float = setting(
        "fraction of the steps, at the end, in which the learning rates decay to 0 along half a "
        "cosine; between warm-up and decay they are constant (1: no constant phase)",
        1.0,
        low=0,
        high=1,
    )
    optimizer: Literal["adamw", "adamw_8bit"] = setting(
        "adamw_8bit: keep AdamW's moments in 8 bits instead of 32 (arXiv 2110.02861), for a run on "
        "one GPU; needs the package torchao, and a compiler",
        "adamw",
    )
    weight_decay: float = setting("AdamW weight decay of the LoRA matrices", 0.0, low=0, high=1)
    max_grad_norm: float = setting(
        "clip gradients to this global norm (0: do not clip)", 1.0, low=0
    )
    epochs: float = setting("number of epochs", 1.0, low=0, high=1e6)
    max_steps: int = setting(
        "number of optimizer steps (-1: as many as --epochs takes)", -1, low=-1
    )
    global_batch_size: int = setting(
        "rows per optimizer step, divided among the processes", 16, low=1
    )
    micro_batch_size: int = setting(
        "largest number of rows per process in a forward pass; the rest of its share of the global "
        "batch is accumulated",
        4,
        low=1,
        affects_result=False,
    )
    packing: bool = setting(
        "train on packed rows, as step 4 wrote them; otherwise every document or conversation is a "
        "row, padded to the longest of its batch: slower, with the same losses",
        True,
    )
    document_mask: bool = setting(
        "restart positions and keep attention inside each document of a block", True
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "dtype of the computation; auto: bf16 on GPUs that support it, fp16 on others, fp32 on a "
        "CPU",
        "auto",
    )
    gradient_checkpointing: Literal["none", "selective", "full"] = setting(
        "activations that the backward pass computes again instead of keeping them: less memory, "
        "more time; selective: not attention and its matrix products; full: all",
        "none",
        affects_result=False,
    )
    compile: bool = setting(
        "compile the layers with torch.compile: a slower start, then faster on a GPU",
        False,
        affects_result=False,
    )
    deepspeed: Path | None = setting("DeepSpeed configuration file, such as ds_zero2.json", None)
    estimate: int | None = setting(
        "print the memory estimate per GPU for this number of GPUs and exit; of a base model, with "
        "the rows that step 3 will add",
        None,
        low=1,
        affects_result=False,
    )
    link_speed: float = setting(
        "GB/s that a GPU sends to another, for the hours of --estimate (0: they leave it out); "
        "all_reduce_perf of nccl-tests measures it as busbw",
        0.0,
        low=0,
        affects_result=False,
    )
    tokenizer: Path | None = setting(
        "output folder of step 2, whose pieces --estimate adds to a base model", None
    )
    vocab_size: int | None = setting(
        "as of step 1: the pieces that --estimate adds to a base model if step 2 has not run",
        None,
        low=300,
        affects_result=False,
    )
    evaluations: int = setting(
        "number of evenly spaced validations, in addition to one before the first step (0: none)",
        10,
        low=0,
        affects_result=False,
    )
    tracker: Literal["tensorboard", "wandb", "none"] = setting(
        "where to log curves; tensorboard: to <output_dir>.tensorboard/; wandb: to Weights & "
        "Biases, whose package is not among the requirements",
        "tensorboard",
        affects_result=False,
    )
    logging_steps: int = setting(
        "number of steps between log lines", 10, low=1, affects_result=False
    )
    save_steps: int = setting(
        "number of steps between checkpoints, from which a stopped or killed run resumes",
        200,
        low=1,
        affects_result=False,
    )
    keep_checkpoints: int = setting("number of checkpoints to keep", 2, low=1, affects_result=False)
    stall_seconds: float = setting(
        "with several processes: seconds without progress after which a process gives up waiting "
        "for the others; must exceed the time to write a checkpoint",
        600.0,
        low=1,
        affects_result=False,
    )
    max_loss_jump: float = setting(
        "skip a step if the loss of a micro-batch is more than this many times the lowest mean of "
        "20 micro-batches in a row (the largest loss so far, until there are 20)",
        3.0,
        low=1,
    )
    max_skipped_steps: int = setting(
        "stop after more than this many skipped steps in a row", 5, low=1
    )
    seed: int = setting("seed of the LoRA matrices and the order of the rows", 42, low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        # In one order and once: how they are listed does not change the result.
        object.__setattr__(self, "lora_targets", tuple(sorted({*self.lora_targets})))

    def contradictions(self) -> list[str]:
        problems = _find_deepspeed_problems(self.deepspeed) if self.deepspeed is not None else []
        if self.optimizer == "adamw_8bit":
            problems += _find_8bit_problems(self)
        if self.compile and self.estimate is None:
            problems += _find_compiler_problems("--compile", "pass --no-compile")
        if self.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
            problems.append("--tracker wandb needs its package: run `pip install wandb`")
        if self.embedding_rows == "new" and not self.train_embeddings:
            problems.append(
                "--embedding-rows new trains embeddings: leave out --no-train-embeddings"
            )
        if self.learning_rate == 0 and not self.train_embeddings:
            problems.append("--learning-rate 0 and --no-train-embeddings leave nothing to train")
        if self.continue_from is not None and (
            os.path.realpath(self.continue_from) == os.path.realpath(self.output_dir)
        ):
            problems.append(
                f"--continue-from {self.continue_from} is the output folder as well: choose "
                "another --output-dir"
            )
        processes = self.estimate or int(os.environ.get("WORLD_SIZE", "1"))
        if self.global_batch_size % processes:
            problems.append(
                f"--global-batch-size {self.global_batch_size} cannot be divided evenly among "
                f"{processes} processes: choose a multiple of {processes}"
            )
        if self.max_steps == 0 or (self.max_steps < 0 and self.epochs == 0):
            problems.append("--max-steps and --epochs leave nothing to train")
        return problems

    def trained_linears(self, shape: ModelShape) -> tuple[Linear, ...]:
        """Return the linear layers of a layer whose LoRA matrices are trained.

        Raises ConfigError if --lora-targets names one that the model does not have.
        """
        targets = shape.find_linears(self.lora_targets)
        return targets if self.learning_rate else ()

    def count_parameters(self, shape: ModelShape, old_rows: int | None = None) -> ParameterCounts:
        """Count the parameters of a model of this shape.

        New rows are those after `old_rows`; by default the tokenizer of `model` says which.
        """
        lora = shape.lora_weights(self.lora_rank, self.trained_linears(shape))
        rows = shape.rows if self.train_embeddings else 0
        if rows and self.embedding_rows == "new":
            if old_rows is None:
                old_rows = families.load_tokenizer(self.model).first_new_id
            rows -= old_rows
        embeddings = shape.embeddings * rows * shape.hidden
        return ParameterCounts(lora, embeddings, shape.weights - embeddings)

    def disk_bytes(self) -> int:
        """Estimate the size of checkpoints, adapter and merged model.

        There is one checkpoint more than are kept, and one from before the decay.
        """
        trained = self.count_parameters(read_shape(self.model)).all
        count = self.keep_checkpoints + 1 + (self.decay_ratio < 1)
        checkpoints = CHECKPOINT_BYTES * trained * count
        return REPORTS_BYTES + checkpoints + WEIGHT_BYTES * trained + weights_bytes(self.model)


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Settings of step 6."""

    replay: float = setting(
        "add pretraining blocks of --data, this many for each row of conversations: the model "
        "forgets less of what it was pretrained on, and a run has as many more steps",
        0.0,
        low=0,
        high=10,
    )
    samples: int = setting(
        "number of validation questions of each kind to answer at the end, greedily and by "
        "sampling (0: none)",
        5,
        low=0,
        affects_result=False,
    )
    max_new_tokens: int = setting(
        "maximum length of these answers in tokens", 256, low=1, affects_result=False
    )


def _find_deepspeed_problems(path: Path) -> list[str]:
    """Return what is wrong with a DeepSpeed configuration, one sentence each."""
    try:
        stage = read_json(path)["zero_optimization"]["stage"]
    except OSError:
        return [f"--deepspeed {path} not found"]
    except ValueError as error:
        return [f"--deepspeed {path} is not JSON ({error})"]
    except (KeyError, TypeError):
        return [f"--deepspeed {path} names no ZeRO stage: expected 2, as in ds_zero2.json"]
    if stage == 3:
        # huggingface/peft#2450, deepspeedai/DeepSpeed#7669
        return [
            f"--deepspeed {path} asks for ZeRO stage 3, which shards the weights too: with it, "
            "fully trained embeddings have been saved as empty tensors; use ds_zero2.json"
        ]
    return []


def _find_8bit_problems(config: TrainingConfig) -> list[str]:
    """Return why these settings cannot train with 8-bit moments here, one sentence each."""
    if config.deepspeed is not None or (config.estimate or 1) > 1:
        return [
            "--optimizer adamw_8bit is for one GPU: several share the moments out (ZeRO-2), which "
            "has them in float32"
        ]
    if config.estimate is not None:
        return []
    problems = _find_compiler_problems("--optimizer adamw_8bit", "leave it out")
    if importlib.util.find_spec("torchao") is None:
        problems.append(
            "--optimizer adamw_8bit needs torchao: run `pip install -r requirements-extras.txt`"
        )
    return problems


def _find_compiler_problems(setting: str, cure: str) -> list[str]:
    """Return what a setting that calls torch.compile lacks on this machine, one sentence each.

    On a GPU, Triton compiles with CC, gcc or clang; on a CPU, Inductor does with CXX or g++. Both
    need Python's headers. They look for them when the first batch is computed.
    """
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    on_gpu = has_gpu and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    variable, programs = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++",))
    if chosen := os.environ.get(variable):
        programs = (chosen,)
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    problems = []
    if not any(map(shutil.which, programs)):
        problems.append(
            f"{setting} needs {' or '.join(programs)}, which is not found: install it (on Debian "
            f"and Ubuntu with `apt install build-essential`), set {variable}, or {cure}"
        )
    if not (headers / "Python.h").is_file():
        problems.append(
            f"{setting} needs Python.h, which is not in {headers}: install Python's headers (on "
            f"Debian and Ubuntu with `apt install python3-dev`), or {cure}"
        )
    return problems
