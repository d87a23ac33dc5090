"""Which parameters of a model train where only its routers, or its routers and experts, do."""

from typing import Literal

from moetools.forward.streaming import StreamedModel

MoePart = Literal["router", "experts"]


def trained_names(streamed: StreamedModel, part: MoePart) -> frozenset[str]:
    """Names in the model of the parameters of all MoE layers that train; correction biases stay as they are.

    Args:
        part: "router" for router rows and biases, "experts" for the experts' projections and biases as well.
    """
    return frozenset(name for index in streamed.stock.moe_layers for name in _layer_names(streamed, index, part))


def _layer_names(streamed: StreamedModel, index: int, part: MoePart) -> list[str]:
    arch, moe = streamed.arch, streamed.stock.moe_layers[index]
    layer = streamed.stock.layer(index)
    inside = [f"{arch.router}.weight", *filter(None, [arch.router_bias])]
    if part == "experts":
        experts = layer.get_submodule(f"{moe.block}.{arch.experts}")
        inside += [f"{arch.experts}.{name}" for name, _ in experts.named_parameters(recurse=False)]
    present = {name for name, _ in layer.named_parameters()}
    prefix = f"{streamed.stock.decoder_path}.layers.{index}.".lstrip(".")
    return [f"{prefix}{moe.block}.{name}" for name in inside if f"{moe.block}.{name}" in present]
