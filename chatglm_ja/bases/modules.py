"""The parts of a transformers model, found by what they are: no name of an architecture occurs.

embeddings    what `get_input_embeddings` and `get_output_embeddings` return; one if tied
layers        the list of modules that is as long as config.num_hidden_layers
linears       the linear layers in these, nn.Linear or GPT-2's Conv1D, which LoRA adapts
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from chatglm_ja.bases.shape import Linear, ModelShape
from chatglm_ja.errors import DataError


def find_embeddings(model: Any) -> dict[str, nn.Module]:
    """Return the embedding modules by name, input first; of tied ones the input only."""
    source, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    shared = {id(parameter) for parameter in source.parameters()}
    is_tied = any(id(parameter) in shared for parameter in output.parameters())
    return {names[id(module)]: module for module in ([source] if is_tied else [source, output])}


def find_layers(model: Any) -> nn.ModuleList:
    """Return the transformer's layers. Raises DataError if the model has no list of them."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise DataError(f"{type(model).__name__} has no list of its {count} layers: give another base")


def find_linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers in `module` with their names."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | Conv1D):
            yield name, part


def has_transposed_weights(model: Any) -> bool:
    """Return whether the linear layers' weights are stored [inputs, outputs], as GPT-2's are."""
    return any(isinstance(module, Conv1D) for _, module in find_linears(find_layers(model)))


def measure(config: Any) -> ModelShape:
    """Return the sizes of the model that a transformers configuration describes.

    The model is built on the meta device, so it takes no memory; one pass through it shows which
    linear layers have the same input. Raises DataError for weights in the layers that LoRA
    cannot adapt.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    layers = find_layers(model)
    linears = dict(find_linears(layers[0]))
    for name, parameter in layers.named_parameters():
        if parameter.dim() > 1 and name.rpartition(".")[0].partition(".")[2] not in linears:
            raise DataError(
                f"{type(model).__name__} has weights of shape {tuple(parameter.shape)} in {name}, "
                "which is not a linear layer (experts of a mixture, for example): LoRA cannot "
                "train them; give another base"
            )
    seen: list[tuple[torch.Tensor, Linear]] = []

    def note(name: str, module: Any, given: Any) -> None:
        outputs, inputs = module.weight.shape
        if isinstance(module, Conv1D):
            outputs, inputs = inputs, outputs
        seen.append((given[0], Linear(name.rpartition(".")[2], inputs, outputs)))

    for name, module in linears.items():
        module.register_forward_pre_hook(functools.partial(note, name))
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    stages: dict[int, list[Linear]] = {}
    for given, linear in seen:
        stages.setdefault(id(given), []).append(linear)
    embeddings: list[Any] = list(find_embeddings(model).values())
    rows, hidden = embeddings[0].weight.shape
    config = config.get_text_config()
    return ModelShape(
        layers=len(layers),
        stages=tuple(map(tuple, stages.values())),
        hidden=hidden,
        heads=config.num_attention_heads,
        rows=rows,
        embeddings=len(embeddings),
        other_weights=model.num_parameters() - len(embeddings) * rows * hidden,
        positions=config.max_position_embeddings,
    )
