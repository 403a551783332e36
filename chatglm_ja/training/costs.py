"""Estimate what training costs from shapes alone: memory per GPU, and floating-point operations.

No weights are loaded: the model's config.json and the step's settings are enough, so that a run can
be planned for any number of GPUs before there are data and weights. tests/training/test_costs.py
compares the activations with what autograd saves, and docs/training.md the totals with runs on a
GPU. Activations are those of GlmForCausalLM's layer, with two RMS norms and a gated MLP; other
layers of this kind keep nearly as much.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from chatglm_ja.bases import families
from chatglm_ja.bases.shape import Linear, ModelShape, read_shape
from chatglm_ja.chatglm3.tokenizer import FIRST_PIECES
from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json
from chatglm_ja.storage.manifest import read_manifest
from chatglm_ja.training.recomputation import is_kept, kept_bytes
from chatglm_ja.training.settings import ParameterCounts, TrainingConfig
from chatglm_ja.vocabulary.settings import ResizeModelConfig, padded_rows

GB, GIB = 1e9, 2**30
# What a GPU holds besides PyTorch's tensors, in GiB: the CUDA context, the libraries' buffers, and
# blocks that the allocator keeps: 1 to 2.
OVERHEAD_GIB = 2.0
# Ids of ChatGLM3-6B's published tokenizer. Its model has 65,024 rows: the rest are padding.
PUBLISHED_IDS = 64_798
# Of a trained weight's two moments; in 8 bits, 256 of either share a float32 scale.
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}
CONTROL_AND_BYTE_PIECES = len(FIRST_PIECES) + 256


@dataclass(frozen=True)
class Card:
    """A GPU model.

    device   regex of the name that CUDA gives it, whole, without "NVIDIA " and "GeForce "
    tflops   dense bfloat16 tensor throughput with float32 accumulation, from the data sheet
    memory   GiB that nvidia-smi reports: error correction takes a sixteenth of GDDR6
    """

    name: str
    device: str
    tflops: float
    memory: float


# A name that is not in this table, such as that of a variant or of a MIG slice, is another card.
CARDS = (
    Card("RTX 3090", "RTX 3090", 71.0, 24),
    Card("RTX 4090", "RTX 4090", 165.2, 24),
    Card("RTX 5090", "RTX 5090", 209.5, 31.8),
    Card("RTX A6000", "RTX A6000", 154.8, 48),
    Card("RTX 6000 Ada", "RTX 6000 Ada Generation", 364.2, 48),
    Card("A10", "A10", 125.0, 22.5),
    Card("A10G", "A10G", 70.0, 22.5),
    Card("L4", "L4", 121.0, 22.5),
    Card("L40", "L40", 181.0, 45),
    Card("L40S", "L40S", 362.0, 45),
    Card("A100 40 GB", "A100-(SXM4|PCIE)-40GB", 312.0, 40),
    Card("A100 80 GB", "A100-SXM4-80GB|A100 80GB PCIe", 312.0, 80),
    Card("A800 80 GB", "A800-SXM4-80GB|A800 80GB PCIe", 312.0, 80),
    Card("H100 SXM", "H100 80GB HBM3", 989.4, 79.6),
    Card("H100 PCIe", "H100 PCIe", 756.0, 79.6),
    Card("H100 NVL", "H100 NVL", 835.0, 93.6),
    Card("H200 SXM", "H200", 989.4, 140.4),
    Card("H200 NVL", "H200 NVL", 835.0, 140.4),
)
# HFU, which counts recomputation too, of runs on an H100 (docs/training.md) by whether layers are
# compiled: 38.6% and 39.3% without and with gradient checkpointing, not compiled 28.6% and 29.6%.
MEASURED_HFU = {True: 0.39, False: 0.29}
# Rows of logits that a GPU holds at once while it computes the loss.
LOSS_ROWS = 1024


def activation_bytes(
    shape: ModelShape, rank: int, targets: Collection[Linear], length: int, width: int = 2
) -> int:
    """Return the bytes per token that a layer keeps for its backward pass.

    `targets` are the linear layers with LoRA matrices of this rank. `width` is the size of a number
    in bytes: 2 in half precision, 4 in float32.
    """
    # What is multiplied with a target. Queries, keys and values share their input.
    inputs = [stage[0].inputs for stage in shape.stages if {*stage} & {*targets}]
    return (
        2 * 4 * shape.hidden  # the inputs of both norms in float32
        + width
        * (3 + 1)
        * shape.attention  # queries, keys and values repeated for all heads, output
        + width * length  # a row of the mask
        + 4 * shape.heads  # logarithms of the softmax's sums
        + width * 3 * shape.ffn  # the MLP's two halves, the activation
        + width * sum(inputs)
        + width * len(targets) * rank  # the inner products of LoRA
        + 2 * 4  # a scale of each norm
        + width * shape.attention // shape.heads  # rotary cosine and sine
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
    """Return the peak memory of each GPU as (item, GB) pairs, as PyTorch allocates it.

    One process trains without DeepSpeed, with trained weights in float32. Several use ZeRO stage 2,
    which keeps a copy of them in the precision of the computation and shards the float32 ones,
    Adam's moments and the gradients. Frozen weights have that precision, too. The peak is at the
    loss, or at the start or the end of the backward pass.
    """
    width = bytes_per_number(config)
    tokens = BatchPlan.divide(config, processes).micro_batch * config.block_size
    zero = processes > 1 or config.deepspeed is not None
    always: list[tuple[str, float]] = [("frozen weights", width * trained.frozen)]
    if zero:
        always += [
            ("trained weights", width * trained.all),
            ("float32 weights and Adam's moments", 12 * trained.all / processes),
            ("communication buckets", 2 * width * bucket_elements(shape, config)),
        ]
        if BatchPlan.divide(config, processes).accumulation > 1:
            always.append(("gradients of earlier micro-batches", width * trained.all))
    else:
        moments = MOMENT_BYTES[config.optimizer]
        always += [("trained weights", 4 * trained.all), ("Adam's moments", moments * trained.all)]

    layer = tokens * activation_bytes(
        shape, config.lora_rank, config.trained_linears(shape), config.block_size, width
    )
    # The gradients of the MLP's activations are the largest of a layer.
    working = tokens * width * 4 * shape.ffn
    activations = shape.layers * layer
    if config.gradient_checkpointing != "none":
        working += layer
        activations = (
            shape.layers * tokens * kept_bytes(shape, config.gradient_checkpointing, width)
        )
    # The gradient of the output matrix is summed in float32, and converted under ZeRO. While the
    # loss is computed, there is also a copy of float32 weights in half precision, or of new rows
    # concatenated with the old ones.
    gradient = trained.embeddings / shape.embeddings
    is_copied = trained.embeddings and (config.embedding_rows == "new" or (width == 2 and not zero))
    copy = width * shape.rows * shape.hidden if is_copied else 0
    logits = min(LOSS_ROWS, tokens) * shape.rows * (width + 4) + 4 * tokens * shape.hidden
    loss: list[tuple[str, float]] = [
        ("activations", activations),
        ("working memory of the loss", max(logits, width * gradient if zero else 0)),
        ("output matrix: gradient, and a copy if one is made", 4 * gradient + copy),
    ]
    start: list[tuple[str, float]] = [
        ("activations", activations),
        ("working memory of a layer", working),
        ("output matrix: gradient", (width if zero else 4) * gradient),
    ]
    end: list[tuple[str, float]] = [("gradients", 4 * trained.all)]
    if zero:
        end = [
            ("gradients, and their copy in float32", (width + 4) * trained.all / processes),
            ("input matrix: gradient before it is reduced", width * gradient),
        ]
    peak = max(loss, start, end, key=lambda items: sum(size for _, size in items))
    return [(item, size / GB) for item, size in always + peak]


def bytes_per_number(config: TrainingConfig) -> int:
    """Return the bytes of a number in the precision of the computation; auto: that of a GPU."""
    return 4 if config.precision == "fp32" else 2


def bucket_elements(shape: ModelShape, config: TrainingConfig) -> int:
    """Return the elements of ZeRO's reduction bucket, of which two exist during a reduction."""
    size = read_zero(config).get("reduce_bucket_size", 500_000_000)
    return shape.hidden**2 if size == "auto" else int(size)  # as transformers sets "auto"


def read_zero(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings of ZeRO; those of ds_zero2.json that matter here if none are given."""
    if config.deepspeed is None:
        return {"reduce_bucket_size": 50_000_000, "use_multi_rank_bucket_allreduce": False}
    return dict(read_json(config.deepspeed)["zero_optimization"])


def flops_per_token(
    shape: ModelShape,
    trained: ParameterCounts,
    targets: Collection[Linear],
    context: float,
    scored: float = 1.0,
) -> float:
    """Return the floating-point operations per trained token, forward and backward.

    A frozen weight takes 2 in the forward pass and 2 for the gradient of its input; a trained one
    2 more for its own gradient. Recomputation by gradient checkpointing does not count (MFU as in
    PaLM, arXiv:2204.02311, with frozen weights). `targets` are the linear layers whose LoRA
    matrices are trained. `context` is the mean number of tokens of its document that a token
    attends to; `scored` is the share of tokens with a loss: only they are multiplied with the
    output matrix.
    """
    output = scored * (4 * shape.rows * shape.hidden + 2 * trained.embeddings / shape.embeddings)
    attention = 4 * shape.attention * context  # forward, in a layer
    # The input embedding is a lookup. If it is frozen, the first layer needs no gradient of what
    # comes before its first target.
    unneeded = 0.0
    for index, stage in enumerate(shape.stages if not trained.embeddings else ()):
        unneeded += 2 * sum(linear.weights for linear in stage)
        if index == 1:  # its input is the attention's output
            unneeded += 2 * attention
        if {*stage} & {*targets}:
            break
    weights = sum(linear.weights for linear in shape.linears)
    layers = shape.layers * (4 * weights + 3 * attention)
    return layers + output + 6 * trained.lora - unneeded


def recomputed_flops_per_token(shape: ModelShape, config: TrainingConfig, context: float) -> float:
    """Return the floating-point operations per token that gradient checkpointing adds.

    `context` is as for `flops_per_token`. Nothing needs the result of a layer's last product again,
    but only compiled layers leave it out if LoRA's follow it.
    """
    level = config.gradient_checkpointing
    if level == "none":
        return 0.0
    targets, last = config.trained_linears(shape), shape.stages[-1]
    total = 4 * shape.attention * context if level == "full" else 0.0
    for linear in shape.linears:
        is_last, is_target = linear in last, linear in targets
        is_repeated = level == "full" or not is_kept(linear, shape)
        if is_repeated and not (is_last and (config.compile or not is_target)):
            total += 2 * linear.weights
        if is_target:
            total += 2 * config.lora_rank * (linear.inputs + linear.outputs * (not is_last))
    return shape.layers * total


def recomputed_share(shape: ModelShape, config: TrainingConfig, context: float) -> float:
    """Return the operations that are computed again, relative to those that are required.

    HFU, the use of the hardware, is 1 plus this times MFU.
    """
    trained = config.count_parameters(shape)
    required = flops_per_token(shape, trained, config.trained_linears(shape), context)
    return recomputed_flops_per_token(shape, config, context) / required


def mean_context(lengths: Iterable[Iterable[int]]) -> float:
    """Return how many tokens of its document a token attends to on average, itself included.

    `lengths` are the lengths of the documents in each row.
    """
    documents = [length for row in lengths for length in row]
    return sum(n * (n + 1) / 2 for n in documents) / max(sum(documents), 1)


def peak_tflops(device: str) -> float | None:
    """Return the data sheet's bfloat16 TFLOP/s for a GPU's name, or None if it is unknown."""
    name = device.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return next((card.tflops for card in CARDS if re.fullmatch(card.device, name)), None)


def plan_rows(config: TrainingConfig, shape: ModelShape) -> tuple[int, int]:
    """Return the embedding rows of the model to be trained, and the id of its first new piece.

    A base model gets rows for the pieces that step 2 has added, or step 1 is to learn. Without a
    tokenizer, it is taken to have the one that was published with ChatGLM3-6B.
    """
    is_resized, old, reserved = False, min(PUBLISHED_IDS, shape.rows), CONTROL_AND_BYTE_PIECES
    if families.tokenizer_files(config.model):
        try:
            tokenizer = families.load_tokenizer(config.model)
        except DataError:  # it is no model of a step
            base = families.open_base(config.model)
            tokenizer, reserved = base.tokenizer, base.vocabulary.reserved
        old = tokenizer.first_new_id
        is_resized = old < tokenizer.size
    merged = read_manifest(config.tokenizer) if config.tokenizer is not None else None
    new = merged.counts.get("added") if merged is not None else None
    if not isinstance(new, int) and config.vocab_size is not None:
        new = config.vocab_size - reserved
    if is_resized or not isinstance(new, int):
        return shape.rows, old
    return max(shape.rows, padded_rows(old + new, ResizeModelConfig.pad_to_multiple)), old


def describe_costs(config: TrainingConfig, gpus: int) -> str:
    """Return the text that --estimate prints."""
    published = read_shape(config.model)
    rows, old = plan_rows(config, published)
    shape = replace(published, rows=rows)
    plan = BatchPlan.divide(config, gpus)
    trained = config.count_parameters(shape, old)
    items = [
        (item, size * GB / GIB) for item, size in estimate_memory(shape, trained, config, gpus)
    ] + [("CUDA context, the allocator's unused blocks", OVERHEAD_GIB)]
    total = sum(size for _, size in items)
    tokens = config.global_batch_size * config.block_size
    now = f" ({published.rows:,} before step 3)" if rows != published.rows else ""
    precision = "float32" if bytes_per_number(config) == 4 else "half precision"
    lines = [
        f"{config.model.name}: {(trained.frozen + trained.embeddings) / 1e9:.3f} B parameters, "
        f"{rows:,} embedding rows{now}",
        f"trained: {trained.embeddings / 1e6:.1f} M embedding and {trained.lora / 1e6:.1f} M LoRA "
        "parameters",
        f"step: micro-batch {plan.micro_batch} x accumulation {plan.accumulation} x {gpus} GPU"
        f"{'s' * (gpus > 1)} = {config.global_batch_size} blocks of {config.block_size:,} tokens = "
        f"{tokens:,} tokens",
        f"{f'peak memory per GPU, in {precision}':<62}{'GiB':>8}",
        *(f"  {item:<60}{size:>8.2f}" for item, size in items),
        f"  {'total':<60}{total:>8.2f}",
        *_describe_cards(shape, trained, config, plan, total),
    ]
    return "\n".join(lines)


def _describe_cards(
    shape: ModelShape, trained: ParameterCounts, config: TrainingConfig, plan: BatchPlan, gib: float
) -> Iterable[str]:
    """Yield lines on whether each card holds `gib`, on its hours for a billion tokens, on traffic.

    The hours are those of half precision, the only one whose speed was measured.
    """
    hfu = MEASURED_HFU[config.compile]
    context = config.block_size / 2  # documents as long as a block: the most that it can be
    required = flops_per_token(shape, trained, config.trained_linears(shape), context)
    repeated = recomputed_flops_per_token(shape, config, context)
    tokens = config.global_batch_size * config.block_size
    sent = sent_per_step(trained, config, plan.processes)
    seconds = sent / config.link_speed if config.link_speed else 0.0
    is_half = bytes_per_number(config) == 2
    yield f"{'card':<20}{'GiB':>8}{'fits':>8}" + f"{'h for 1 B tokens':>20}" * is_half
    for card in CARDS:
        computed = tokens * (required + repeated) / (hfu * card.tflops * 1e12 * plan.processes)
        hours = 1e9 / tokens * (computed + seconds) / 3600
        fits = "yes" if gib <= card.memory else "no"
        row = f"  {card.name:<18}{card.memory:>8g}{fits:>8}"
        yield row + f"{hours:>20,.{int(hours < 10)}f}" * is_half
    if is_half:
        mfu = hfu * required / (required + repeated)
        yield f"  hours at {hfu:.0%} HFU, as measured on an H100, which is {mfu:.0%} MFU here"
    if plan.processes > 1 and config.link_speed:
        yield f"  with {seconds:.2f} s to send {sent:.1f} GB after each step's computation"
    elif plan.processes > 1:
        yield f"  plus the time to send {sent:.1f} GB per GPU and step: see --link-speed"


def sent_per_step(trained: ParameterCounts, config: TrainingConfig, processes: int) -> float:
    """Return the GB that a GPU sends per step under ZeRO-2, to its neighbour in a ring of them.

    Gradients are reduced to their owners once per step, and the updated weights are gathered: of
    either, it sends all but its own share. A configuration without ds_zero2.json's setting for it
    reduces gradients to all, which sends twice as much.
    """
    to_all = read_zero(config).get("use_multi_rank_bucket_allreduce", True)
    share = (processes - 1) / processes
    return ((2 if to_all else 1) + 1) * share * bytes_per_number(config) * trained.all / GB
