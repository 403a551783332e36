"""Cost estimates compared with torch: parameters, autograd's saved tensors, counted operations."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from chatglm_ja.bases import families, modules
from chatglm_ja.bases.shape import read_shape
from chatglm_ja.chatglm3 import base_config
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.training import adapter, costs
from chatglm_ja.training.settings import ParameterCounts, TrainingConfig
from tests import tiny_models
from tests.conftest import PROJECT, write_manifest
from tests.training.runs import config_for

SIZES_6B = {
    "num_layers": 28,
    "hidden_size": 4096,
    "ffn_hidden_size": 13_696,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "padded_vocab_size": 65_024,
    "seq_length": 8192,
    "layernorm_epsilon": 1e-5,
}
CHATGLM3_6B = modules.measure(base_config.glm_config(SIZES_6B, 65_024, torch.float16))


@pytest.fixture
def config(resized_dir: Path, data_dir: Path, tmp_path: Path) -> TrainingConfig:
    return config_for(resized_dir, data_dir, tmp_path)


def config_6b(**changes: Any) -> TrainingConfig:
    """The recipe of the 6B profile, as benchmarks/train_6b.py runs it."""
    settings: dict[str, Any] = {"model": Path(), "data": Path(), "output_dir": Path()}
    return TrainingConfig(**settings | {"global_batch_size": 16, "micro_batch_size": 4} | changes)


def test_the_parameters_of_chatglm3_6b() -> None:
    """As published."""
    assert CHATGLM3_6B.weights == 6_243_584_000


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embedding_rows": "new", "lora_rank": 3},
        {"learning_rate": 0.0},
        {"train_embeddings": False},
        {"lora_targets": ("down_proj", "v_proj")},
    ],
)
def test_parameters_are_those_of_the_model(
    resized_dir: Path, data_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, **changes)
    model = adapter.load_for_training(config, torch.float32)
    trained = config.count_parameters(read_shape(resized_dir))
    assert trained.all == sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for n, p in model.named_parameters() if not p.requires_grad and "lora_" not in n]
    assert trained.frozen == sum(p.numel() for p in frozen)


def test_both_layouts_give_the_same_shape(resized_dir: Path, base_dir: Path) -> None:
    resized, base = read_shape(resized_dir), read_shape(base_dir)
    assert resized.rows > base.rows
    assert resized == replace(base, rows=resized.rows)
    with pytest.raises(DataError, match="not found: the sizes are read from it"):
        read_shape(resized_dir / "nowhere")


def kept_bytes(model: Any, batch: int, length: int, rows: int = 400) -> int:
    """Return the bytes that autograd saves in a forward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(5, rows, (batch, length))
    half = torch.arange(length // 2)
    positions = torch.cat([half, half]).expand(batch, length)  # two documents: there is a mask
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(input_ids=ids, position_ids=positions, labels=ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learning_rate": 0.0},
        {"lora_targets": ("q_proj", "v_proj")},
        {"lora_targets": ("o_proj",)},
        {"lora_targets": ("gate_up_proj", "down_proj")},
    ],
)
def test_activations_are_what_autograd_keeps(
    resized_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """The difference between all layers of the test model and one layer fewer."""
    config = config_for(resized_dir, data_dir, tmp_path, **changes)
    batch, length = 2, 64
    kept = []
    for cut in (0, 1):
        model: Any = adapter.load_for_training(config, dtype).to(dtype)
        layers = model.get_base_model().model.layers
        for _ in range(cut):
            del layers[-1]
        model.config.num_hidden_layers = len(layers)
        kept.append(kept_bytes(model, batch, length))
    shape = read_shape(config.model)
    per_token = costs.activation_bytes(
        shape, config.lora_rank, config.trained_linears(shape), length, dtype.itemsize
    )
    assert kept[0] - kept[1] == batch * length * per_token


def count_operations(config: TrainingConfig, ids: int) -> float:
    """Return the operations that torch counts, relative to those that are expected."""
    model = adapter.load_for_training(config, torch.float32)
    # The products of fused attention are not counted on a CPU.
    model.config._attn_implementation = "eager"
    batch, length = 2, 32
    input_ids = torch.randint(5, ids, (batch, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=input_ids).logits
        F.cross_entropy(logits.flatten(0, 1), input_ids.flatten()).backward()
    shape = read_shape(config.model)
    trained = config.count_parameters(shape)
    # Attention is computed over the whole block, LoRA's products also where they do not learn.
    expected = costs.flops_per_token(shape, trained, config.trained_linears(shape), context=length)
    if not trained.lora:
        expected += 4 * shape.lora_weights(config.lora_rank, shape.linears)
    return counter.get_total_flops() / (expected * batch * length)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("glm", 0.0), ("llama", 0.07), ("qwen3", 0.06), ("gpt2", 0.5)]
)
def test_activations_of_other_architectures(tmp_path: Path, kind: str, tolerance: float) -> None:
    """The formula is that of GlmForCausalLM's layer. Llama does not copy the attention's output,
    Qwen3 normalizes queries and keys too, and GPT-2's dropout keeps the attention's weights."""
    config = config_for(tmp_path / "2", tmp_path, tmp_path)
    batch, length = 2, 64
    kept = []
    for layers in (2, 1):
        folder = tiny_models.make_tiny(kind, tmp_path / str(layers), num_hidden_layers=layers)
        model: Any = adapter.load_for_training(replace(config, model=folder), torch.float32)
        kept.append(kept_bytes(model, batch, length, 320))
    shape = read_shape(config.model)
    per_token = costs.activation_bytes(
        shape, config.lora_rank, config.trained_linears(shape), length, 4
    )
    found = (kept[0] - kept[1]) / (batch * length)
    assert per_token == pytest.approx(found, rel=tolerance)


@pytest.mark.parametrize("changes", [{}, {"train_embeddings": False}, {"lora_targets": ("c_fc",)}])
@pytest.mark.parametrize("kind", tiny_models.SIZES)
def test_operations_of_other_architectures(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Tied embeddings are a lookup and a product, too."""
    if "lora_targets" in changes and kind != "gpt2":
        changes = {"lora_targets": ("o_proj",)}
    folder = tiny_models.make_tiny(kind, tmp_path)
    config = config_for(folder, tmp_path, tmp_path, **changes)
    assert count_operations(config, 320) == pytest.approx(1, rel=8e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_embeddings": False},
        {"learning_rate": 0.0},
        {"lora_targets": ("q_proj", "down_proj")},
        {"lora_targets": ("q_proj", "k_proj", "v_proj"), "train_embeddings": False},
        {"lora_targets": ("o_proj",), "train_embeddings": False},
        {"lora_targets": ("down_proj",), "train_embeddings": False},
    ],
)
def test_operations_are_those_that_torch_counts(
    resized_dir: Path, data_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, **changes)
    assert count_operations(config, 400) == pytest.approx(1, rel=2e-3)


@pytest.mark.parametrize(
    ("processes", "changes", "measured_gb"),
    [
        (4, {"gradient_checkpointing": "full"}, 17.82),
        (4, {}, 40.06),
        (1, {"global_batch_size": 4}, 45.36),
    ],
)
def test_memory_is_what_a_gpu_measured(
    processes: int, changes: dict[str, Any], measured_gb: float
) -> None:
    """Peaks on an H100 with 78,592 rows (benchmarks/train_6b.py: "4090 x 4", "share of 4", "one
    GPU"), of a loss that kept copies of the output matrix in place of its gradient in float32."""
    shape = replace(CHATGLM3_6B, rows=78_592)
    config = config_6b(**changes)
    trained = config.count_parameters(shape)
    items = costs.estimate_memory(shape, trained, config, processes)
    assert sum(size for _, size in items) == pytest.approx(measured_gb, rel=0.02)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [
        (16, 4, 4, (4, 1)),
        (16, 4, 1, (4, 4)),
        (16, 4, 8, (2, 1)),
        (24, 4, 4, (3, 2)),
        (14, 4, 2, (1, 7)),
    ],
)
def test_a_global_batch_is_divided(
    batch: int, micro: int, processes: int, expected: tuple[int, int]
) -> None:
    plan = costs.BatchPlan.divide(
        config_6b(global_batch_size=batch, micro_batch_size=micro), processes
    )
    assert (plan.micro_batch, plan.accumulation) == expected
    assert plan.micro_batch * plan.accumulation * processes == batch


@pytest.mark.parametrize("processes", [3, 32])
def test_processes_that_do_not_divide_a_batch_are_refused(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = f"--global-batch-size 16 cannot be divided evenly among {processes} processes"
    with pytest.raises(ConfigError, match=message):
        config_6b(estimate=processes)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError, match=message):
        config_6b()


def test_context_is_counted_over_documents() -> None:
    lengths = [[3, 1], [2]]
    seen = [1, 2, 3, 1, 1, 2]
    assert costs.mean_context(lengths) == pytest.approx(sum(seen) / len(seen))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        # Variants and slices of cards are not those cards.
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090 D v2", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA A100X", None),
        ("NVIDIA H100 PCIe MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla K80", None),
    ],
)
def test_peaks_are_found_by_name(name: str, peak: float | None) -> None:
    assert costs.peak_tflops(name) == peak


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The folder of ChatGLM3-6B with nothing but its config.json."""
    config = base_config.REQUIRED_CONFIG | SIZES_6B
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def new_rows(model: Path, **changes: Any) -> tuple[int, int]:
    """The rows that --estimate counts, and how many of them are new."""
    config = config_6b(model=model, **changes)
    rows, old = costs.plan_rows(config, read_shape(model))
    return rows, rows - old


def test_the_estimate_of_a_base_counts_the_rows_that_step_3_adds(
    published: Path, base_dir: Path, resized_dir: Path, merged_dir: Path, tmp_path: Path
) -> None:
    # 64,798 ids, and 14,000 pieces without 3 control and 256 byte pieces; to a multiple of 64.
    assert new_rows(published, vocab_size=14_000) == (78_592, 13_794)
    assert new_rows(published) == (65_024, 226)
    step2 = tmp_path / "step2"
    step2.mkdir()
    assert new_rows(published, vocab_size=14_000, tokenizer=step2) == (78_592, 13_794)
    write_manifest(step2, {"added": 10_742})
    assert new_rows(published, vocab_size=14_000, tokenizer=step2) == (75_584, 10_786)
    # The base of the tests has 4,000 pieces and 9 special tokens.
    assert new_rows(base_dir, vocab_size=1000) == (4800, 4800 - 4009)
    resized = read_shape(resized_dir).rows
    assert new_rows(resized_dir, vocab_size=14_000) == (resized, resized - 4009)
    copied = tmp_path / "copied"  # the result of step 8 with --to chatglm
    copied.mkdir()
    config = json.loads((base_dir / "config.json").read_text()) | {"padded_vocab_size": resized}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "tokenizer.model").write_bytes((resized_dir / "tokenizer.model").read_bytes())
    assert new_rows(copied, vocab_size=14_000) == (resized, resized - 4009)


@pytest.mark.parametrize("kind", tiny_models.SIZES)
def test_the_estimate_of_a_base_of_any_architecture(tmp_path: Path, kind: str) -> None:
    """Step 1 learns as many merges of bytes as --vocab-size says."""
    base = tiny_models.make_base(kind, tmp_path, ["the quick brown fox", "and the lazy dog"])
    rows = read_shape(base).rows
    ids = families.open_base(base).first_new_id
    expected = -(-(ids + 1000) // 64) * 64
    assert new_rows(base, vocab_size=1000) == (expected, expected - ids)
    assert new_rows(base) == (rows, rows - ids)
    text = costs.describe_costs(config_6b(model=base, vocab_size=1000), 1)
    assert f"({rows:,} before step 3)" in text


def test_the_estimate_of_one_card_with_new_rows_reads_no_tokenizer(published: Path) -> None:
    text = costs.describe_costs(
        config_6b(model=published, vocab_size=14_000, embedding_rows="new"), 1
    )
    assert "78,592 embedding rows (65,024 before step 3)" in text
    assert f"trained: {2 * 13_794 * 4096 / 1e6:.1f} M embedding" in text


@pytest.mark.parametrize("changes", [{}, {"precision": "fp32"}, {"embedding_rows": "new"}])
@pytest.mark.parametrize("gpus", [1, 4])
def test_the_total_is_all_that_a_card_must_hold(
    published: Path, gpus: int, changes: dict[str, Any]
) -> None:
    lines = costs.describe_costs(config_6b(model=published, **changes), gpus).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("peak memory per GPU"))
    end = next(i for i, line in enumerate(lines) if line.startswith("  total"))
    items = [float(line.split()[-1]) for line in lines[start + 1 : end]]
    total = float(lines[end].split()[-1])
    assert total == pytest.approx(sum(items), abs=0.05)
    assert "CUDA context" in lines[end - 1]
    assert " GB" not in "\n".join(lines[start:end])
    cards = {
        line[:20].strip(): line.split()
        for line in lines[end + 2 :]
        if " yes" in line or " no" in line
    }
    assert set(cards) == {card.name for card in costs.CARDS}
    for card in costs.CARDS:
        assert ("yes" in cards[card.name]) == (total <= card.memory)


def test_float32_takes_twice_the_memory_of_what_is_not_trained(published: Path) -> None:
    def frozen(precision: str) -> float:
        config = config_6b(model=published, precision=precision)
        trained = config.count_parameters(CHATGLM3_6B)
        return dict(costs.estimate_memory(CHATGLM3_6B, trained, config, 4))["frozen weights"]

    assert frozen("fp32") == 2 * frozen("bf16") == 2 * frozen("fp16") == 2 * frozen("auto")
    text = costs.describe_costs(config_6b(model=published, precision="fp32"), 4)
    assert "in float32" in text
    assert "hours" not in text  # no speed was measured


def loss_items(**changes: Any) -> dict[str, float]:
    """The estimate of a card alone at its peak, which is at the loss, in GB."""
    shape = replace(CHATGLM3_6B, rows=78_592)
    config = config_6b(**changes)
    return dict(costs.estimate_memory(shape, config.count_parameters(shape, 64_798), config, 1))


def test_the_output_matrix_has_a_float32_gradient_and_a_copy_where_one_is_made() -> None:
    name = "output matrix: gradient, and a copy if one is made"
    gb = 78_592 * 4096 / 1e9
    new = (78_592 - 64_798) * 4096 / 1e9
    assert loss_items()[name] == pytest.approx((4 + 2) * gb)
    # With micro-batches of four, float32 has its peak in the layers.
    assert loss_items(precision="fp32", micro_batch_size=2)[name] == pytest.approx(4 * gb)
    assert loss_items(embedding_rows="new")[name] == pytest.approx(4 * new + 2 * gb)
    assert loss_items(train_embeddings=False).get(name, 0) == 0


def test_a_24_gb_card_is_compared_in_gib(published: Path) -> None:
    """24.98 GB are 23.3 GiB, which a card of 24 GiB holds."""
    config = config_6b(
        model=published, vocab_size=14_000, lora_rank=8, gradient_checkpointing="full"
    )
    text = costs.describe_costs(config, 1)
    assert re.search(r"total +23\.\d\d\n", text)
    assert re.search(r"RTX 4090 +24 +yes", text)
    assert re.search(r" L4 +22\.5 +no", text)


def test_the_estimate_says_what_a_step_is(base_dir: Path, tmp_path: Path) -> None:
    config = config_6b(
        model=base_dir, estimate=4, deepspeed=PROJECT / "ds_zero2.json", embedding_rows="all"
    )
    text = costs.describe_costs(config, 4)
    assert (
        "micro-batch 4 x accumulation 1 x 4 GPUs = 16 blocks of 1,024 tokens = 16,384 tokens"
        in text
    )
    shape = read_shape(base_dir)
    items = costs.estimate_memory(shape, config.count_parameters(shape), config, 4)
    gib = sum(size for _, size in items) * 1e9 / 2**30
    assert f"{gib + costs.OVERHEAD_GIB:.2f}" in text
    settings = json.loads((PROJECT / "ds_zero2.json").read_text())
    shape = read_shape(base_dir)
    expected = settings["zero_optimization"]["reduce_bucket_size"]
    assert costs.bucket_elements(shape, config) == expected
    settings["zero_optimization"]["reduce_bucket_size"] = "auto"
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    config = config_6b(deepspeed=tmp_path / "ds.json")
    assert costs.bucket_elements(shape, config) == shape.hidden**2


def test_the_hours_are_those_of_the_measured_speed() -> None:
    """An H100 with a quarter of the work trained 11,547 tokens/s (docs/training.md), with LoRA of
    rank 8; documents as long as blocks take a little more."""
    shape = replace(CHATGLM3_6B, rows=78_592)
    config = config_6b(gradient_checkpointing="full", compile=True)
    trained = config.count_parameters(shape)
    lines = "\n".join(costs._describe_cards(shape, trained, config, costs.BatchPlan(4, 1, 4), 20))
    assert "hours at 39% HFU, as measured on an H100, which is 29% MFU here" in lines
    measured = 1e9 / (4 * 11_547) / 3600
    (found,) = re.findall(r"H100 SXM .* (\S+)\n", lines)
    assert float(found) == pytest.approx(measured, rel=0.03)


def test_traffic_is_what_deepspeed_logged(tmp_path: Path) -> None:
    """benchmarks/zero2_traffic.py, two processes in float32: 12.32 and 12.32 MB are sent of the
    demo's 24.64 MB of gradients and of weights, and 24.64 and 12.32 if they are reduced to all."""
    trained = ParameterCounts(lora=160_000, embeddings=6_000_000, frozen=0)
    config = config_6b(precision="fp32", deepspeed=PROJECT / "ds_zero2.json")
    assert costs.sent_per_step(trained, config, 2) == pytest.approx(24.64e-3)
    assert costs.read_zero(config).items() >= costs.read_zero(config_6b()).items()
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    config = replace(config, deepspeed=tmp_path / "ds.json")
    assert costs.sent_per_step(trained, config, 2) == pytest.approx(36.96e-3)
    assert costs.sent_per_step(trained, config_6b(), 4) == pytest.approx(2 * 6.16e-3 * 2 * 3 / 4)


def test_the_hours_include_the_time_to_send(published: Path) -> None:
    def hours(link_speed: float) -> float:
        config = config_6b(model=published, vocab_size=14_000, link_speed=link_speed)
        text = costs.describe_costs(config, 4)
        (found,) = re.findall(r"RTX 3090 .* (\S+)\n", text)
        return float(found)

    trained = config_6b().count_parameters(replace(CHATGLM3_6B, rows=78_592), 64_798)
    seconds = costs.sent_per_step(trained, config_6b(), 4) / 0.5
    assert hours(0.5) - hours(0) == pytest.approx(1e9 / 16_384 * seconds / 3600, abs=1)
