"""Which parameters of a model train: of its routers, of routers and experts, or all that are not packed."""

from typing import Any, Literal

import torch
from torch import Tensor

from moetools.formats.reader import PackedCheckpoint
from moetools.forward.streaming import StreamedModel
from moetools.training.options import TrainOptions

MoePart = Literal["router", "experts"]


def trained_names(streamed: StreamedModel, part: MoePart) -> frozenset[str]:
    """Names in the model of the parameters of all MoE layers that train; correction biases stay as they are.

    Args:
        part: "router" for router rows and biases, "experts" for the experts' projections and biases as well.
    """
    return frozenset(name for index in streamed.stock.moe_layers for name in _layer_names(streamed, index, part))


def packed_names(streamed: StreamedModel) -> frozenset[str]:
    """Names in the model of the parameters that are made of packed tensors; none for a plain checkpoint.

    A model of another config than its checkpoint's is still to be made of that, and is written plain.
    """
    source, stock = streamed.checkpoint, streamed.stock
    if not isinstance(source, PackedCheckpoint) or streamed.config != source.config:
        return frozenset()
    inside = f"{stock.decoder_path}.layers.".lstrip(".")
    found = set()
    for name, parameter in stock.model.named_parameters():
        layer = int(name.removeprefix(inside).partition(".")[0]) if name.startswith(inside) else None
        meta: dict[str, Tensor] = {name: parameter.to("meta")}
        if not source.packed.keys().isdisjoint(stock.stored_tensors(layer, meta)):
            found.add(name)
    return frozenset(found)


def _layer_names(streamed: StreamedModel, index: int, part: MoePart) -> list[str]:
    arch, moe = streamed.arch, streamed.stock.moe_layers[index]
    layer = streamed.stock.layer(index)
    inside = [f"{arch.router}.weight", *filter(None, [arch.router_bias])]
    if part == "experts":
        experts = layer.get_submodule(moe.inside(arch.experts))
        inside += [f"{arch.experts}.{name}" for name, _ in experts.named_parameters(recurse=False)]
    present = {name for name, _ in layer.named_parameters()}
    prefix = f"{streamed.stock.decoder_path}.layers.{index}.".lstrip(".")
    return [prefix + moe.inside(name) for name in inside if moe.inside(name) in present]


def parameter_groups(model: torch.nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """AdamW's groups; norms and biases are not decayed."""
    groups = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        rate = options.learning_rate
        if options.relative_rate:
            rate *= parameter.detach().square().mean().sqrt().item() or 1e-2
        decay = options.weight_decay if parameter.dim() > 1 else 0.0
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return groups
