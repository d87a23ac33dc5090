"""Experts of one layer that stay packed in memory, in the place of transformers' experts module, for every family.

transformers keeps a layer's experts in `gate_up_proj` (or `up_proj`, without gates) and `down_proj`, one matrix an
expert. Here a matrix is decoded when tokens are routed to its expert, from the one or two streams it has on disk.
"""

import itertools
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import UnsupportedModelError
from moetools.formats.base import Packed
from moetools.formats.layouts.moetools import Own, is_transposed
from moetools.formats.reader import PackedCheckpoint
from moetools.forward.conversion import names_in_model, operations_on
from moetools.hf.expert_cache import ExpertCache

_WEIGHT = re.compile(r"(.+)\.(gate_up_proj|up_proj|down_proj)$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")
_ORDER = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 0, "w2": 0}
"""Place of an expert's own tensor among the rows of its matrix in the model."""
_STACKED = {"MergeModulelist", "Concatenate"}
"""What transformers' loader may do to tensors of single experts; `_ORDER` is in which order."""
_AT_ONCE = 8
"""Experts that are decoded together."""
_HINT = "load it dequantized, with AutoModelForCausalLM.from_pretrained"


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """One matrix on disk: its place among the rows of the expert's matrix, and whether it is turned behind decoding."""

    order: int
    packed: Packed
    disk: str
    turned: bool


_Matrices = dict[tuple[str, int], list[_Stream]]
"""(projection, expert) -> its streams."""


class PackedExperts(nn.Module):
    """f_e(x) = down_e @ act(gate_up_e @ x), biases and norms as in transformers' module; weights as bytes.

    Its numbers are those of the same weights in `moetools.forward.experts`, bit for bit on a CPU.

    Attributes:
        names: names of the packed tensors.
    """

    def __init__(self, path: str, experts: Any, layout: Own, matrices: Mapping[tuple[str, int], Sequence[_Stream]]):
        super().__init__()
        self.num_experts = experts.num_experts
        self.names = {one.packed.name for some in matrices.values() for one in some}
        # Not its module, only its functions: its own weights stay on the meta device.
        self._stock = (experts,)
        self._path, self._layout, self._matrices = path, layout, matrices
        self._numbers = {key: number for number, key in enumerate(matrices)}
        self._inputs = "gate_up_proj" if experts.has_gate else "up_proj"
        side = 2 if experts.is_transposed else 1
        self._width = {name: getattr(experts, name).shape[side] for name in (self._inputs, "down_proj")}
        for name, parameter in experts.named_parameters(recurse=False):
            if name not in (self._inputs, "down_proj"):
                self.register_parameter(name, parameter)
        for name, child in experts.named_children():
            self.add_module(name, child)

    def fill(self, view: PackedCheckpoint, device: torch.device, cache: ExpertCache) -> None:
        """Take the bytes from disk; every checksum is checked."""
        streams = [(one.packed, one.disk) for some in self._matrices.values() for one in some]
        tensors = view.disk.read(disk for _, disk in streams)
        self._held = self._layout.hold(streams, tensors)
        self._cache = cache
        ends = itertools.accumulate(len(some) for some in self._matrices.values())
        self._rows = [range(end - len(some), end) for end, some in zip(ends, self._matrices.values(), strict=True)]
        for name, tensor in self._held.tensors.items():
            # As integers: `model.to(dtype)` would round steps.
            stored = tensor.view(torch.int32) if tensor.is_floating_point() else tensor
            self.register_buffer(f"packed_{name}", stored.to(device), persistent=False)
        # The buffers alone own the memory, wherever the model is moved to.
        self._held = self._held.on({name: tensor.to("meta") for name, tensor in self._held.tensors.items()})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        num_tokens, top_k = top_k_index.shape
        expert_S, order_S = torch.sort(top_k_index.reshape(-1))
        counts_E = torch.bincount(expert_S, minlength=self.num_experts)[: self.num_experts]
        counts = counts_E.tolist()
        weight_S = top_k_weights.reshape(-1).index_select(0, order_S)
        (stock,) = self._stock
        fused_SF = self._project(self._inputs, hidden_states.index_select(0, order_S // top_k), expert_S, counts)
        inner_SF = stock._apply_gate(fused_SF) if stock.has_gate else stock.act_fn(fused_SF)
        output_SD = self._project("down_proj", inner_SF, expert_S, counts)
        if getattr(stock, "has_post_expert_norm", False):
            output_SD = stock.post_expert_norm(output_SD)
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
        weighted_SD = (output_SD * weight_S.unsqueeze(-1)).index_select(0, place_S)
        return weighted_SD.view(num_tokens, top_k, output_SD.shape[1]).sum(dim=1).to(hidden_states.dtype)

    def _project(self, name: str, hidden_SI: Tensor, expert_S: Tensor, counts: Sequence[int]) -> Tensor:
        """Projection `name` of each slot's own expert, bias included; slots are sorted by expert."""
        ends = list(itertools.accumulate(counts))
        used = [expert for expert in range(self.num_experts) if counts[expert]]
        # What is kept comes first: before what is decoded now takes its place.
        used.sort(key=lambda expert: self._key(name, expert) not in self._cache)
        # Slots of no expert here (expert parallelism) add nothing.
        result_SO = hidden_SI.new_zeros(len(hidden_SI), self._width[name])
        for start in range(0, len(used), _AT_ONCE):
            some = used[start : start + _AT_ONCE]
            for expert, weight_OI in zip(some, self._weights(name, some, hidden_SI), strict=True):
                rows = slice(ends[expert] - counts[expert], ends[expert])
                result_SO[rows] = torch.mm(hidden_SI[rows], weight_OI.T)
        bias = getattr(self, f"{name}_bias", None)
        return result_SO if bias is None else result_SO + bias[expert_S.clamp(max=self.num_experts - 1)]

    def _weights(self, name: str, experts: Sequence[int], like: Tensor) -> list[Tensor]:
        """[O, I] weights of some experts; those that are not kept are decoded together."""
        found = {expert: self._cache.take(self._key(name, expert), like.device, like.dtype) for expert in experts}
        missing = [expert for expert in experts if found[expert] is None]
        if missing:
            found |= self._decoded(name, missing, like)
        return [weight for expert in experts if (weight := found[expert]) is not None]

    def _decoded(self, name: str, missing: Sequence[int], like: Tensor) -> dict[int, Tensor]:
        """Weights that were not kept; they are, from now on."""
        found = {}
        stored = {key: getattr(self, f"packed_{key}") for key in self._held.tensors}
        held = self._held.on({key: stored[key].view(one.dtype) for key, one in self._held.tensors.items()})
        groups = [self._rows[self._numbers[name, expert]] for expert in missing]
        # In the dtype of the tensor on disk first, as every other reader has it.
        dtype = TORCH_DTYPES[self._matrices[name, missing[0]][0].packed.dtype]
        for expert, decoded_OI in zip(missing, held.dense(groups, dtype), strict=True):
            turned = self._matrices[name, expert][0].turned
            weight_OI = (decoded_OI.T if turned else decoded_OI).to(like.dtype)
            self._cache.put(self._key(name, expert), weight_OI)
            found[expert] = weight_OI
        return found

    def _key(self, name: str, expert: int) -> Hashable:
        return self._path, name, expert


def replace_experts(model: Any, view: PackedCheckpoint) -> list[PackedExperts]:
    """Put `PackedExperts` in the place of every experts module whose weights are packed.

    Raises:
        UnsupportedModelError: there is none, or one whose matrices are not all packed or loaded in a way of its own.
    """
    assert isinstance(view.layout, Own)
    replaced = []
    for path, matrices in _experts_of(model, view).items():
        module = model.get_submodule(path)
        _check(path, module, matrices)
        packed = PackedExperts(path, module, view.layout, matrices)
        model.set_submodule(path, packed)
        replaced.append(packed)
    if not replaced:
        raise UnsupportedModelError(f"{view.path}: no layer whose experts can stay packed", hint=_HINT)
    return replaced


def _experts_of(model: Any, view: PackedCheckpoint) -> dict[str, _Matrices]:
    """Experts modules by path, and their packed matrices."""
    found: dict[str, _Matrices] = {}
    modules = {name for name, module in model.named_modules() if hasattr(module, "num_experts")}
    targets = names_in_model(model, view.packed)
    mine = {}
    for name, target in targets.items():
        weight = _WEIGHT.search(target)
        if weight and weight[1] in modules:
            mine[name] = weight
    operations = operations_on(model, mine)
    for name, weight in mine.items():
        packed = view.packed[name]
        allowed = _STACKED if len(packed.shape) == 2 else set()
        transposed = model.get_submodule(weight[1]).is_transposed
        if not set(operations[name]) <= allowed or (allowed and transposed):
            raise _cannot(weight[1], f"'{name}' is changed while it is loaded ({', '.join(operations[name])})")
        turned = is_transposed(packed) != transposed
        for number, disk in enumerate(packed.parts.values()):
            expert, order = (number, 0) if len(packed.shape) == 3 else _place(name)
            stream = _Stream(order=order, packed=packed, disk=disk, turned=turned)
            found.setdefault(weight[1], {}).setdefault((weight[2], expert), []).append(stream)
    for matrices in found.values():
        for some in matrices.values():
            some.sort(key=lambda one: one.order)
    return found


def _place(name: str) -> tuple[int, int]:
    """Expert and place of a tensor of one expert."""
    found = _EXPERT.search(name)
    if not found or found[2] not in _ORDER:
        raise _cannot(name, "its name does not say which expert and which projection it is")
    return int(found[1]), _ORDER[found[2]]


def _check(path: str, module: Any, matrices: _Matrices) -> None:
    """Every matrix of the module must be there, whole."""
    fused = "gate_up_proj" if module.has_gate else "up_proj"
    if set(matrices) != {(name, expert) for name in (fused, "down_proj") for expert in range(module.num_experts)}:
        raise _cannot(path, "some of its matrices are packed and others are not")
    if len({one.packed.dtype for streams in matrices.values() for one in streams}) > 1:
        raise _cannot(path, "they have more than one dtype")
    for (name, _), streams in matrices.items():
        shape = tuple(getattr(module, name).shape[1:])
        whole = streams[0].packed.shape[-2:]
        if len(streams) > 1:
            in_blocks = getattr(module, "is_concatenated", True)
            if not in_blocks or len({one.order for one in streams}) != len(streams):
                raise _cannot(path, f"it has {name} in another order than the checkpoint")
            whole = (sum(one.packed.shape[0] for one in streams), whole[1])
        if whole != shape:
            raise _cannot(path, f"its {name} is {list(shape)}, the checkpoint's {list(whole)}")


def _cannot(path: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the experts of {path} cannot stay packed: {why}", hint=_HINT)
