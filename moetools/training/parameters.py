"""A student whose routers (and, if asked for, experts) can be trained, and its trained tensors in canonical form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights, extract
from moetools.forward.streaming import StreamedModel
from moetools.training.experts import use_trainable_experts

Train = Literal["router", "router+experts"]
ROUTER_STEP = 5.0
"""Relative step of the routers over that of the experts: few numbers, each seen by every token."""


class Student:
    """A whole model in memory of which only some parameters train.

    The optimizer changes fp32 masters; where the compute dtype is fp32 they are the parameters themselves.

    Attributes:
        model: the stock transformers model, in evaluation mode.
        masters: the trained tensors in fp32, by parameter name.
    """

    def __init__(self, streamed: StreamedModel, train: Train) -> None:
        self.streamed, self.train = streamed, train
        self._disk_dtypes: dict[str, torch.dtype] = {}
        self._corrections: dict[int, Tensor] = {}
        self.model = self._load()
        use_trainable_experts(self.model)
        self._parameters = {name: self.model.get_parameter(name) for name in self._disk_dtypes}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            is_master = parameter.dtype == torch.float32
            self.masters[name] = parameter if is_master else parameter.detach().float()

    def _load(self) -> Any:
        stock = self.streamed.stock
        stock.load_rest()
        for index in range(stock.num_layers):
            native = stock.read_layer(index)
            stock.fill_layer(index, native)
            if index in stock.moe_layers:
                self._note(index, native)
        return stock.model

    def _note(self, index: int, native: Mapping[str, Tensor]) -> None:
        """What of a layer's tensors on disk is needed later: dtypes, and the correction bias as it is."""
        correction = self.streamed.stock.weights(index, native).correction_bias_E
        if correction is not None:
            self._corrections[index] = correction.cpu().clone()
        for name in trained_names(self.streamed, index, self.train):
            self._disk_dtypes[name] = native[name.removeprefix(_layer_prefix(self.streamed, index))].dtype

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """AdamW's parameter groups: a step of `learning_rate` is relative to the root mean square of each tensor."""
        found = []
        for name, master in self.masters.items():
            factor = 1.0 if f".{self.streamed.arch.experts}." in name else ROUTER_STEP
            rms = master.detach().square().mean().sqrt().item()
            found.append({"params": [master], "lr": learning_rate * factor * (rms or 1e-2)})
        return found

    def gather(self) -> None:
        """Hand the gradients of the parameters to the masters."""
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter and parameter.grad is not None:
                self.masters[name].grad, parameter.grad = parameter.grad.float(), None

    def scatter(self) -> None:
        """Hand the masters' values to the parameters."""
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter:
                parameter.data.copy_(self.masters[name])

    @contextlib.contextmanager
    def as_stored(self) -> Iterator[dict[str, Tensor]]:
        """The model as it will be on disk: every trained tensor rounded to its dtype there; yields those tensors."""
        exact = {name: self.masters[name].detach().clone() for name in self.masters}
        stored = {name: exact[name].to(dtype).cpu() for name, dtype in self._disk_dtypes.items()}
        for name, parameter in self._parameters.items():
            parameter.data.copy_(stored[name])
        try:
            yield stored
        finally:
            for name, master in self.masters.items():
                master.data.copy_(exact[name])
            self.scatter()

    def canonical(self, stored: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """`LayerWeights` fields of each MoE layer from the tensors of `as_stored`; correction biases as they were."""
        arch = self.streamed.arch
        found: dict[int, dict[str, Tensor]] = {}
        for index, moe in self.streamed.stock.moe_layers.items():
            prefix = f"{_layer_prefix(self.streamed, index)}{moe.block}."
            block = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
            fields = {"router_ED": block[f"{arch.router}.weight"]}
            if self.train == "router+experts":
                fields = extract(arch, block, moe.layout).tensors()
            elif arch.router_bias and arch.router_bias in block:
                fields["router_bias_E"] = block[arch.router_bias]
            if index in self._corrections:
                fields["correction_bias_E"] = self._corrections[index]
            found[index] = {name: tensor.clone() for name, tensor in fields.items()}
        return found


def load_teacher(streamed: StreamedModel) -> Any:
    """The whole stock model with its weights; nothing requires a gradient."""
    streamed.stock.load_rest()
    for index in range(streamed.stock.num_layers):
        streamed.stock.fill_layer(index, streamed.stock.read_layer(index))
    return streamed.stock.model


def trained_names(streamed: StreamedModel, index: int, train: Train) -> list[str]:
    """Names in the model of a MoE layer's parameters that train; correction biases get no gradient and stay."""
    arch, moe = streamed.arch, streamed.stock.moe_layers[index]
    layer = streamed.stock.layer(index)
    inside = [f"{arch.router}.weight", *filter(None, [arch.router_bias])]
    if train == "router+experts":
        experts = layer.get_submodule(f"{moe.block}.{arch.experts}")
        inside += [f"{arch.experts}.{name}" for name, _ in experts.named_parameters(recurse=False)]
    present = {name for name, _ in layer.named_parameters()}
    prefix = _layer_prefix(streamed, index)
    return [f"{prefix}{moe.block}.{name}" for name in inside if f"{moe.block}.{name}" in present]


def split_fields(fields: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Router fields and expert fields of `LayerWeights`."""
    router = {name: tensor for name, tensor in fields.items() if name in LayerWeights.ROUTER_FIELDS}
    return router, {name: tensor for name, tensor in fields.items() if name not in router}


def _layer_prefix(streamed: StreamedModel, index: int) -> str:
    return f"{streamed.stock.decoder_path}.layers.{index}.".lstrip(".")
