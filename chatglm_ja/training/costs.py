"""What training costs, from the shapes alone: memory on each GPU, and floating-point operations.

Nothing is loaded: config.json of the model and the settings of the step are enough, so a run can be
planned for any number of GPUs before any data or weights are there. The formulas count what this
pipeline keeps. tests/training/test_costs.py compares the activations with what autograd saves,
and docs/training.md the totals against runs on a GPU.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.chatglm3.base_config import ModelShape, read_shape
from chatglm_ja.training.settings import TrainingConfig

GB = 1e9
WEIGHT_BYTES = 4  # trained weights are kept in float32
CHECKPOINT_BYTES = 3 * WEIGHT_BYTES  # a trained weight and its two moments
# Dense tensor throughput in bfloat16 with float32 accumulation, TFLOP/s, as the makers' data sheets
# give it; by the part of the device's name that says which it is, the more specific ones first.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
# What runs have reached of that peak on an H100 (docs/training.md): (with gradient checkpointing,
# with compiled layers).
USUAL_MFU = {(True, True): 0.30, (True, False): 0.20, (False, True): 0.38, (False, False): 0.28}
PLANNED_ON = ("RTX 3090", "RTX 4090", "A100", "H100")
# Rows of logits that are there at once on a GPU while the loss is computed.
LOSS_ROWS = 1024


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters that a run trains, and that it leaves as they are."""

    lora: int
    embeddings: int
    frozen: int

    @property
    def all(self) -> int:
        return self.lora + self.embeddings


def trained_parameters(shape: ModelShape, config: TrainingConfig) -> ParameterCounts:
    """With --embedding-rows new the model's tokenizer says how many rows that is."""
    lora = shape.lora_weights(config.lora_rank) if config.learning_rate else 0
    rows = 0
    if config.train_embeddings:
        rows = shape.rows
        if config.embedding_rows == "new":
            rows -= chat_format.first_new_id(tokenizer.load_processor(config.model))
    embeddings = 2 * rows * shape.hidden
    total = shape.layer_weights + shape.embedding_weights
    return ParameterCounts(lora, embeddings, total - embeddings)


def activation_bytes(shape: ModelShape, rank: int, length: int) -> int:
    """Bytes per token that a layer keeps for its backward pass, in half precision.

    Both norms keep their input in float32 and their output in half precision; attention keeps
    queries, keys and values (repeated for all heads), its output twice, a row of the mask and the
    logarithm of its sums; the MLP both halves, the activation and their product; LoRA the narrow
    products; the two norms a scale each, and rotary positions a cosine and a sine.
    """
    attention = shape.heads * shape.head_dim
    return (
        2 * (4 + 2) * shape.hidden
        + 2 * (3 + 2) * attention
        + 2 * length
        + 4 * shape.heads
        + 2 * 4 * shape.ffn
        + 2 * 6 * rank
        + 2 * 4
        + 2 * shape.head_dim
    )


@dataclass(frozen=True)
class BatchPlan:
    """How a step's blocks are divided: blocks in a pass, passes of each process, processes."""

    micro_batch: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, config: TrainingConfig, processes: int) -> "BatchPlan":
        """The processes divide the global batch evenly: `config` has been checked for that."""
        share = config.global_batch_size // processes
        micro = max(n for n in range(1, min(share, config.micro_batch_size) + 1) if share % n == 0)
        return cls(micro, share // micro, processes)

    def __str__(self) -> str:
        return f"{self.micro_batch} rows x {self.accumulation} passes x {self.processes} processes"


def estimate_memory(
    shape: ModelShape, trained: ParameterCounts, config: TrainingConfig, processes: int
) -> list[tuple[str, float]]:
    """What training holds on each GPU at its fullest moment: (what, GB).

    One process trains without DeepSpeed, with float32 weights of what is trained; several with
    ZeRO stage 2, which leaves a half-precision copy of them and shares out the float32 ones, Adam's
    moments and the gradients. All that is frozen is in half precision. The fullest moment is when
    the backward pass begins, or ends.
    """
    plan = BatchPlan.of(config, processes)
    tokens = plan.micro_batch * config.block_size
    zero = processes > 1 or config.deepspeed is not None
    held: list[tuple[str, float]] = [("frozen weights", 2 * trained.frozen)]
    if zero:
        held += [
            ("trained weights", 2 * trained.all),
            ("float32 weights and Adam's moments", 12 * trained.all / processes),
            ("buckets", 4 * bucket_elements(shape, config)),
        ]
    else:
        held += [("trained weights", 4 * trained.all), ("Adam's moments", 8 * trained.all)]

    layer = tokens * activation_bytes(shape, config.lora_rank, config.block_size)
    # The gradients of the MLP's parts are the largest of a layer.
    in_work = tokens * 2 * 4 * shape.ffn
    kept = shape.layers * layer
    if config.gradient_checkpointing:
        in_work += layer
        kept = shape.layers * tokens * 2 * shape.hidden
    loss = min(LOSS_ROWS, tokens) * shape.rows * (2 + 4 + 4) + 2 * tokens * shape.hidden * 2
    matrix = shape.rows * shape.hidden if trained.embeddings else 0
    # A half-precision copy is made of float32 weights, and of new rows put together with the old.
    copies = 1 if zero and config.embedding_rows == "all" else 2
    begins: list[tuple[str, float]] = [
        ("activations", kept),
        ("a layer or the loss, in work", max(in_work, loss)),
        ("output matrix: gradient, and a copy where one is made", 2 * copies * matrix),
    ]
    ends: list[tuple[str, float]] = [("gradients", 4 * trained.all)]
    if zero:
        ends = [
            ("gradients, and in float32", (2 + 4) * trained.all / processes),
            ("input matrix: its gradient before it is sent", 2 * matrix),
        ]
    fullest = max(begins, ends, key=lambda items: sum(size for _, size in items))
    return [(name, size / GB) for name, size in held + fullest]


def bucket_elements(shape: ModelShape, config: TrainingConfig) -> int:
    """Elements of ZeRO's reduction bucket; two of them are there while gradients are sent."""
    if config.deepspeed is None:
        return 50_000_000
    settings = json.loads(config.deepspeed.read_text(encoding="utf-8"))
    size = settings["zero_optimization"].get("reduce_bucket_size", 500_000_000)
    # What transformers makes of it.
    return shape.hidden**2 if size == "auto" else int(size)


def flops_per_token(
    shape: ModelShape, trained: ParameterCounts, context: float, scored: float = 1.0
) -> float:
    """Floating-point operations that a trained token needs, forward and backward.

    A frozen weight takes 2 for the forward pass and 2 for the gradient of its input, a trained one
    2 more for its own gradient; what gradient checkpointing computes twice is not counted (MFU as
    in PaLM, arXiv:2204.02311, but for frozen weights). `context` is how many tokens of its document
    a token attends to, on average, and `scored` the share of tokens that have a loss: others are
    not multiplied with the output matrix.
    """
    matrices = shape.layers * sum(i * o for i, o in shape.projections)
    head = shape.rows * shape.hidden
    attention = 3 * 4 * shape.layers * shape.heads * shape.head_dim * context
    # The input matrix is looked up, not multiplied with; what is before all that is trained needs
    # no gradient of its input.
    unneeded = 0 if trained.embeddings else 2 * sum(i * o for i, o in shape.projections[:3])
    output = scored * (4 * head + trained.embeddings)
    return 4 * matrices + output + 6 * trained.lora + attention - unneeded


def mean_context(lengths: Iterable[Iterable[int]]) -> float:
    """How many tokens of its document, itself included, a token of these blocks attends to."""
    documents = [length for row in lengths for length in row]
    return sum(n * (n + 1) / 2 for n in documents) / max(sum(documents), 1)


def peak_tflops(device: str) -> float | None:
    """The data sheet's bfloat16 TFLOP/s of a GPU by its name, None where it is not known."""
    if "Laptop" in device:
        return None
    for name, peak in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device):
            return peak
    return None


def describe_costs(config: TrainingConfig) -> str:
    """The table of --estimate."""
    gpus = config.estimate or 1
    shape = read_shape(config.model)
    plan = BatchPlan.of(config, gpus)
    trained = trained_parameters(shape, config)
    items = estimate_memory(shape, trained, config, gpus)
    total = sum(size for _, size in items)
    tokens = config.global_batch_size * config.block_size
    lines = [
        f"{config.model.name}: {(trained.frozen + trained.embeddings) / 1e9:.3f} B parameters, "
        f"{shape.rows:,} embedding rows; trained {trained.embeddings / 1e6:.1f} M in embeddings "
        f"and {trained.lora / 1e6:.1f} M in LoRA matrices",
        f"a step: {tokens:,} tokens = {gpus} GPUs x {plan.accumulation} passes x "
        f"{plan.micro_batch} blocks x {config.block_size} tokens",
        f"{'memory of each GPU':<62}{'GB':>8}",
        *(f"  {name:<60}{size:>8.2f}" for name, size in items),
        f"  {'together':<60}{total:>8.2f}",
        "in half precision; beside it the CUDA context and what the allocator leaves unused, 1 to "
        "2 GB",
        *_times(shape, trained, config, plan),
    ]
    return "\n".join(lines)


def _times(
    shape: ModelShape, trained: ParameterCounts, config: TrainingConfig, plan: BatchPlan
) -> Iterable[str]:
    """How long a billion tokens take on cards of several kinds, and what is sent meanwhile."""
    mfu = USUAL_MFU[config.gradient_checkpointing, config.compile]
    # Documents as long as a block: the most that attention can take.
    operations = 1e9 * flops_per_token(shape, trained, config.block_size / 2)
    hours = {
        card: operations / (mfu * PEAK_TFLOPS[card] * 1e12 * plan.processes) / 3600
        for card in PLANNED_ON
    }
    yield f"a billion tokens at {mfu:.0%} of a card's peak, as an H100 reached with these settings:"
    yield "  " + ", ".join(f"{card} {count:.{int(count < 10)}f} h" for card, count in hours.items())
    if plan.processes > 1:
        gradients, weights = sent_per_step(trained, plan)
        yield (
            f"  besides, each GPU sends {gradients:.1f} GB of gradients and {weights:.1f} GB of "
            "weights a step"
        )


def sent_per_step(trained: ParameterCounts, plan: BatchPlan) -> tuple[float, float]:
    """GB of gradients and of weights that one GPU sends in a step under ZeRO-2, in half precision.

    Gradients are all-reduced after every pass (DeepSpeed's default, of which each GPU then keeps
    its part), and every GPU gathers the updated weights of the others once. In a ring of n GPUs the
    former sends 2 (n - 1) / n of the data, the latter (n - 1) / n.
    """
    once = 2 * trained.all * (plan.processes - 1) / plan.processes / GB
    return 2 * once * plan.accumulation, once
