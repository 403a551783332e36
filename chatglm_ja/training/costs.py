"""Estimate what training costs from shapes alone: memory per GPU, and floating-point operations.

Nothing is loaded: the model's config.json and the step's settings are enough, so that a run can be
planned for any number of GPUs before there are data and weights. tests/training/test_costs.py
compares the activations with what autograd saves, and docs/training.md the totals with runs on a
GPU.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chatglm_ja.chatglm3.base_config import ModelShape, read_shape
from chatglm_ja.storage.files import read_json
from chatglm_ja.training.settings import ParameterCounts, TrainingConfig

GB = 1e9
# Dense bfloat16 tensor throughput with float32 accumulation, in TFLOP/s, from the data sheets. The
# keys are parts of device names; more specific ones come first.
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
# MFU of runs on an H100 (docs/training.md) by (gradient checkpointing, compiled layers).
MEASURED_MFU = {(True, True): 0.30, (True, False): 0.20, (False, True): 0.38, (False, False): 0.28}
PLANNED_GPUS = ("RTX 3090", "RTX 4090", "A100", "H100")
# A layer's matrices in the order of the forward pass; those of a stage have the same input.
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_up_proj",), ("down_proj",))
# Rows of logits that a GPU holds at once while it computes the loss.
LOSS_ROWS = 1024


def activation_bytes(shape: ModelShape, rank: int, targets: Sequence[str], length: int) -> int:
    """Return the bytes per token that a layer keeps for its backward pass, in half precision.

    `targets` are the matrices with LoRA matrices of this rank.
    """
    attention = shape.heads * shape.head_dim
    # What is multiplied with a target. Queries, keys and values share their input.
    inputs = [shape.projections[stage[0]][0] for stage in STAGES if {*stage} & {*targets}]
    return (
        2 * 4 * shape.hidden  # the inputs of both norms in float32
        + 2 * (3 + 1) * attention  # queries, keys and values repeated for all heads, output
        + 2 * length  # a row of the mask
        + 4 * shape.heads  # logarithms of the softmax's sums
        + 2 * 3 * shape.ffn  # the MLP's two halves, the activation
        + 2 * sum(inputs)
        + 2 * len(targets) * rank  # the inner products of LoRA
        + 2 * 4  # a scale of each norm
        + 2 * shape.head_dim  # rotary cosine and sine
    )


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided: rows in a micro-batch, micro-batches a process, processes."""

    micro_batch: int
    accumulation: int
    processes: int

    @classmethod
    def divide(cls, config: TrainingConfig, processes: int) -> "BatchPlan":
        """Divide the global batch among the processes, which `config` has checked to be even."""
        share = config.global_batch_size // processes
        micro = max(n for n in range(1, min(share, config.micro_batch_size) + 1) if share % n == 0)
        return cls(micro, share // micro, processes)

    def __str__(self) -> str:
        unit = "process" if self.processes == 1 else "processes"
        return (
            f"micro-batch {self.micro_batch} x accumulation {self.accumulation} x "
            f"{self.processes} {unit}"
        )


def estimate_memory(
    shape: ModelShape, trained: ParameterCounts, config: TrainingConfig, processes: int
) -> list[tuple[str, float]]:
    """Return the peak memory of each GPU as (item, GB) pairs.

    One process trains without DeepSpeed, with trained weights in float32. Several use ZeRO stage 2,
    which keeps a copy of them in half precision and shards the float32 ones, Adam's moments and the
    gradients. Frozen weights are in half precision. The peak is at the start or at the end of the
    backward pass.
    """
    tokens = BatchPlan.divide(config, processes).micro_batch * config.block_size
    zero = processes > 1 or config.deepspeed is not None
    always: list[tuple[str, float]] = [("frozen weights", 2 * trained.frozen)]
    if zero:
        always += [
            ("trained weights", 2 * trained.all),
            ("float32 weights and Adam's moments", 12 * trained.all / processes),
            ("communication buckets", 4 * bucket_elements(shape, config)),
        ]
    else:
        always += [("trained weights", 4 * trained.all), ("Adam's moments", 8 * trained.all)]

    layer = tokens * activation_bytes(
        shape, config.lora_rank, config.trained_targets, config.block_size
    )
    # The gradients of the MLP's activations are the largest of a layer.
    working = tokens * 2 * 4 * shape.ffn
    activations = shape.layers * layer
    if config.gradient_checkpointing:
        working += layer
        activations = shape.layers * tokens * 2 * shape.hidden
    loss = min(LOSS_ROWS, tokens) * shape.rows * (2 + 4 + 4) + 2 * tokens * shape.hidden * 2
    matrix = shape.rows * shape.hidden if trained.embeddings else 0
    # float32 weights are copied to half precision, and new rows concatenated with the old ones.
    copies = 1 if zero and config.embedding_rows == "all" else 2
    start: list[tuple[str, float]] = [
        ("activations", activations),
        ("working memory of a layer or the loss", max(working, loss)),
        ("output matrix: gradient, and a copy if one is made", 2 * copies * matrix),
    ]
    end: list[tuple[str, float]] = [("gradients", 4 * trained.all)]
    if zero:
        end = [
            ("gradients in half precision and float32", (2 + 4) * trained.all / processes),
            ("input matrix: gradient before it is reduced", 2 * matrix),
        ]
    peak = max(start, end, key=lambda items: sum(size for _, size in items))
    return [(item, size / GB) for item, size in always + peak]


def bucket_elements(shape: ModelShape, config: TrainingConfig) -> int:
    """Return the elements of ZeRO's reduction bucket, of which two exist during a reduction."""
    if config.deepspeed is None:
        return 50_000_000
    settings = read_json(config.deepspeed)
    size = settings["zero_optimization"].get("reduce_bucket_size", 500_000_000)
    return shape.hidden**2 if size == "auto" else int(size)  # as transformers sets "auto"


def flops_per_token(
    shape: ModelShape,
    trained: ParameterCounts,
    targets: Sequence[str],
    context: float,
    scored: float = 1.0,
) -> float:
    """Return the floating-point operations per trained token, forward and backward.

    A frozen weight takes 2 in the forward pass and 2 for the gradient of its input; a trained one
    2 more for its own gradient. Recomputation by gradient checkpointing does not count (MFU as in
    PaLM, arXiv:2204.02311, with frozen weights). `targets` are the matrices whose LoRA matrices are
    trained. `context` is the mean number of tokens of its document that a token attends to;
    `scored` is the share of tokens with a loss: only they are multiplied with the output matrix.
    """
    weights = {name: inputs * outputs for name, (inputs, outputs) in shape.projections.items()}
    output = scored * (4 * shape.rows * shape.hidden + trained.embeddings)
    attention = 4 * shape.heads * shape.head_dim * context  # forward, in a layer
    # The input embedding is a lookup. If it is frozen, the first layer needs no gradient of what
    # comes before its first target.
    unneeded = 0.0
    for stage in STAGES if not trained.embeddings else ():
        unneeded += 2 * sum(weights[name] for name in stage)
        if stage == ("o_proj",):
            unneeded += 2 * attention
        if {*stage} & {*targets}:
            break
    layers = shape.layers * (4 * sum(weights.values()) + 3 * attention)
    return layers + output + 6 * trained.lora - unneeded


def mean_context(lengths: Iterable[Iterable[int]]) -> float:
    """Return how many tokens of its document a token attends to on average, itself included.

    `lengths` are the lengths of the documents in each row.
    """
    documents = [length for row in lengths for length in row]
    return sum(n * (n + 1) / 2 for n in documents) / max(sum(documents), 1)


def peak_tflops(device: str) -> float | None:
    """Return the data sheet's bfloat16 TFLOP/s for a GPU's name, or None if it is unknown."""
    if "Laptop" in device:
        return None
    peaks = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device))
    return next(peaks, None)


def describe_costs(config: TrainingConfig, gpus: int) -> str:
    """Return the text that --estimate prints."""
    shape = read_shape(config.model)
    plan = BatchPlan.divide(config, gpus)
    trained = config.count_parameters(shape)
    items = estimate_memory(shape, trained, config, gpus)
    total = sum(size for _, size in items)
    tokens = config.global_batch_size * config.block_size
    lines = [
        f"{config.model.name}: {(trained.frozen + trained.embeddings) / 1e9:.3f} B parameters, "
        f"{shape.rows:,} embedding rows",
        f"trained: {trained.embeddings / 1e6:.1f} M embedding and {trained.lora / 1e6:.1f} M LoRA "
        "parameters",
        f"step: micro-batch {plan.micro_batch} x accumulation {plan.accumulation} x {gpus} GPU"
        f"{'s' * (gpus > 1)} = {config.global_batch_size} blocks of {config.block_size:,} tokens = "
        f"{tokens:,} tokens",
        f"{'peak memory per GPU, in half precision':<62}{'GB':>8}",
        *(f"  {item:<60}{size:>8.2f}" for item, size in items),
        f"  {'total':<60}{total:>8.2f}",
        "  plus 1 to 2 GB for the CUDA context and the allocator's unused blocks",
        *_describe_time(shape, trained, config, plan),
    ]
    return "\n".join(lines)


def _describe_time(
    shape: ModelShape, trained: ParameterCounts, config: TrainingConfig, plan: BatchPlan
) -> Iterable[str]:
    """Yield lines on the hours for a billion tokens on several GPUs, and the traffic per step."""
    mfu = MEASURED_MFU[config.gradient_checkpointing, config.compile]
    # Documents as long as a block: the most that attention can take.
    operations = 1e9 * flops_per_token(
        shape, trained, config.trained_targets, context=config.block_size / 2
    )
    hours = {
        gpu: operations / (mfu * PEAK_TFLOPS[gpu] * 1e12 * plan.processes) / 3600
        for gpu in PLANNED_GPUS
    }
    yield f"hours for 1 B tokens at {mfu:.0%} MFU, as measured on an H100 with these settings"
    yield "  " + ", ".join(f"{gpu} {count:.{int(count < 10)}f} h" for gpu, count in hours.items())
    if plan.processes > 1:
        gradients, weights = sent_per_step(trained, plan)
        yield (
            f"  plus the time to send {gradients:.1f} GB of gradients and {weights:.1f} GB of "
            "weights per GPU and step"
        )


def sent_per_step(trained: ParameterCounts, plan: BatchPlan) -> tuple[float, float]:
    """Return the GB of gradients and of weights that a GPU sends per step under ZeRO-2.

    Both are in half precision. Gradients are all-reduced after every micro-batch (DeepSpeed's
    default; each GPU then keeps its shard), and the updated weights are gathered once. In a ring of
    n GPUs the former sends 2 (n - 1) / n of the data, the latter (n - 1) / n.
    """
    weights = 2 * trained.all * (plan.processes - 1) / plan.processes / GB
    return 2 * weights * plan.accumulation, weights
