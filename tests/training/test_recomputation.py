"""Gradient checkpointing: the same gradients, from what torch counts that it keeps and repeats."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode

from chatglm_ja.bases.modules import find_layers
from chatglm_ja.bases.shape import read_shape
from chatglm_ja.training import adapter, costs
from chatglm_ja.training.recomputation import Level, kept_bytes
from chatglm_ja.training.settings import TrainingConfig
from tests import tiny_models
from tests.training.runs import config_for

LEVELS: tuple[Level, ...] = ("none", "selective", "full")
IDS = torch.arange(64).reshape(2, 32)
POSITIONS = torch.arange(16).repeat(2).expand(2, 32)  # two documents: there is a mask
MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def load(config: TrainingConfig) -> Any:
    torch.manual_seed(0)
    model: Any = adapter.load_for_training(config, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it is zero, and so would be the gradients of lora_A
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def loss_of(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=IDS, position_ids=POSITIONS, labels=IDS).loss
    return loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [*tiny_models.SIZES])
@pytest.mark.parametrize("targets", [(), "without the last"])
def test_what_is_repeated_is_what_torch_counts(tmp_path: Path, kind: str, targets: Any) -> None:
    """And the gradients stay the same. Attention is not counted on a CPU."""
    folder = tiny_models.make_tiny(kind, tmp_path)
    shape = read_shape(folder)
    if targets:
        targets = tuple(linear.name for linear in shape.linears if linear not in shape.stages[-1])
    found: dict[Level, Any] = {}
    for level in LEVELS:
        config = config_for(
            folder, folder, tmp_path, gradient_checkpointing=level, lora_targets=targets
        )
        model = load(config)
        with FlopCounterMode(display=False) as counter:
            found[level] = gradients(model)
        repeated = costs.recomputed_flops_per_token(shape, config, context=0)
        if level == "none":
            total = counter.get_total_flops()
            assert repeated == 0
        assert counter.get_total_flops() == total + repeated * IDS.numel()
        for name, gradient in found["none"].items():
            assert torch.equal(found[level][name], gradient), name


@pytest.mark.parametrize("kind", ["glm", "qwen3"])
def test_compiled_layers_repeat_what_is_needed(tmp_path: Path, kind: str) -> None:
    """The products in the graphs that a compiler receives, of one layer."""
    folder = tiny_models.make_tiny(kind, tmp_path)
    shape = read_shape(folder)
    products: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target in MATRIX_PRODUCTS:
                rows, columns = node.meta["val"].shape
                products.append(2 * rows * columns * node.args[-1].meta["val"].shape[0])
        return make_boxed_func(graph.forward)

    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition)
    totals, expected = [], []
    for level in LEVELS:
        config = config_for(folder, folder, tmp_path, gradient_checkpointing=level)
        model = load(config)
        torch._dynamo.reset()
        for layer in find_layers(model.get_base_model()):
            layer.compile(backend=backend)
        products.clear()
        gradients(model)
        totals.append(sum(products))
        compiled = replace(config, estimate=1, compile=True)
        expected.append(costs.recomputed_flops_per_token(shape, compiled, 0) * IDS.numel())
    assert [total - totals[0] for total in totals] == [amount / shape.layers for amount in expected]


def live_bytes() -> int:
    """Return the bytes of all float tensors that Python holds: those in autograd's nodes are not.

    The states of the random generators are not floats.
    """
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [value for value in gc.get_objects() if type(value) in kinds]
    tensors = [tensor for tensor in found if tensor.is_floating_point()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("level", LEVELS[1:])
def test_memory_is_what_is_kept(tmp_path: Path, level: Level) -> None:
    """The difference between two layers and one, after a forward pass."""
    kept = []
    for layers in (2, 1):
        folder = tiny_models.make_tiny("glm", tmp_path / str(layers), num_hidden_layers=layers)
        config = config_for(folder, folder, tmp_path, gradient_checkpointing=level)
        model = load(config)
        gc.collect()
        before = live_bytes()
        loss = loss_of(model)
        kept.append(live_bytes() - before)
        del loss
    shape = read_shape(folder)
    expected = IDS.numel() * kept_bytes(shape, level, width=4)
    assert kept[0] - kept[1] == pytest.approx(expected, rel=1e-3)
