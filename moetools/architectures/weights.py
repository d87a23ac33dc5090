"""The canonical form of one MoE layer's weights, the same for every model family, and the way there and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.architectures.base import Architecture


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Every tensor of a MoE layer that has an expert dimension, that dimension first, in the checkpoint's own dtype.

    f_e(x) = down_e @ (act(gate_e @ x + gate_bias_e) * (up_e @ x + up_bias_e)) + down_bias_e

    Attributes:
        up_EFD, down_EDF: projections of every expert.
        gate_EFD: None for families whose experts have no gate.
        gate_bias_EF, up_bias_EF, down_bias_ED: None for families without biases (only gpt-oss style experts have them).
        router_ED: router rows; logits = router_ED @ x + router_bias_E.
        router_bias_E: bias of the router's linear layer, or None.
        correction_bias_E: added to the scores for the choice of experts only (DeepSeek-V3 and kin), or None.
        scale_E: factor of an expert's routing weights (Gemma-4), or None.
    """

    up_EFD: Float[Tensor, "E F D"]
    down_EDF: Float[Tensor, "E D F"]
    router_ED: Float[Tensor, "E D"]
    gate_EFD: Float[Tensor, "E F D"] | None = None
    gate_bias_EF: Float[Tensor, "E F"] | None = None
    up_bias_EF: Float[Tensor, "E F"] | None = None
    down_bias_ED: Float[Tensor, "E D"] | None = None
    router_bias_E: Float[Tensor, "E"] | None = None
    correction_bias_E: Float[Tensor, "E"] | None = None
    scale_E: Float[Tensor, "E"] | None = None

    ROUTER_FIELDS: ClassVar[tuple[str, ...]] = ("router_ED", "router_bias_E", "correction_bias_E", "scale_E")

    @property
    def num_experts(self) -> int:
        return self.router_ED.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def select(self, experts: Int[Tensor, "N"]) -> "LayerWeights":
        """The same layer with only the given experts, in the given order; values are copied, never changed."""
        chosen = {name: tensor.index_select(0, experts.to(tensor.device)) for name, tensor in self.tensors().items()}
        return replace(self, **chosen)


@dataclass(frozen=True, kw_only=True)
class WideExpert:
    """A new expert before its width is fixed: canonical tensors of one expert, any number of neurons W.

    Attributes:
        up_WD, gate_WD, up_bias_W, gate_bias_W, down_DW: as in `LayerWeights`, without the expert dimension; fp32.
        down_bias_D: added once per slot, or None.
    """

    up_WD: Float[Tensor, "W D"]
    down_DW: Float[Tensor, "D W"]
    gate_WD: Float[Tensor, "W D"] | None = None
    up_bias_W: Float[Tensor, "W"] | None = None
    gate_bias_W: Float[Tensor, "W"] | None = None
    down_bias_D: Float[Tensor, "D"] | None = None

    @property
    def width(self) -> int:
        return self.up_WD.shape[0]

    def only(self, neurons: Int[Tensor, "M"]) -> "WideExpert":
        """The same expert with some of its neurons."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[neurons]

        return WideExpert(
            up_WD=self.up_WD[neurons],
            down_DW=self.down_DW[:, neurons],
            gate_WD=rows(self.gate_WD),
            up_bias_W=rows(self.up_bias_W),
            gate_bias_W=rows(self.gate_bias_W),
            down_bias_D=self.down_bias_D,
        )

    def scaled(self, factor: float) -> "WideExpert":
        """`factor` times its output."""
        bias = self.down_bias_D
        return replace(self, down_DW=self.down_DW * factor, down_bias_D=None if bias is None else bias * factor)


def join_experts(parts: Sequence[WideExpert]) -> WideExpert:
    """The neurons of all parts side by side: the sum of their outputs. A part without a bias has one of zeros."""

    def joined(name: str, dim: int = 0) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        if all(tensor is None for tensor in found):
            return None
        zeros = (parts[0].up_WD.new_zeros(part.width) for part in parts)
        return torch.cat([zero if tensor is None else tensor for tensor, zero in zip(found, zeros, strict=True)], dim)

    up, down = joined("up_WD"), joined("down_DW", 1)
    assert up is not None
    assert down is not None
    biases = [part.down_bias_D for part in parts if part.down_bias_D is not None]
    return WideExpert(
        up_WD=up,
        down_DW=down,
        gate_WD=joined("gate_WD"),
        up_bias_W=joined("up_bias_W"),
        gate_bias_W=joined("gate_bias_W"),
        down_bias_D=torch.stack(biases).sum(0) if biases else None,
    )


def stack_experts(weights: LayerWeights, members: tuple[int, ...]) -> WideExpert:
    """All neurons of some experts side by side, in fp32; the down bias is the members' mean."""

    def stacked(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor[expert] for expert in members]).float()

    up = stacked(weights.up_EFD)
    assert up is not None
    bias = weights.down_bias_ED
    return WideExpert(
        up_WD=up,
        down_DW=torch.cat([weights.down_EDF[expert] for expert in members], 1).float(),
        gate_WD=stacked(weights.gate_EFD),
        up_bias_W=stacked(weights.up_bias_EF),
        gate_bias_W=stacked(weights.gate_bias_EF),
        down_bias_D=None if bias is None else torch.stack([bias[expert] for expert in members]).float().mean(0),
    )


@dataclass(frozen=True, kw_only=True)
class ExpertsLayout:
    """How the experts module stores its fused tensors (transformers' own flags on the module).

    Attributes:
        transposed: [E, in, out] instead of [E, out, in].
        interleaved: gate and up rows alternate instead of standing one block after the other.
        gated: there is a gate projection, fused with up as `gate_up_proj`.
    """

    transposed: bool = False
    interleaved: bool = False
    gated: bool = True


def extract(arch: Architecture, block: Mapping[str, Tensor], layout: ExpertsLayout) -> LayerWeights:
    """Canonical weights from the MoE block's tensors (names inside the block); views where the layout allows."""
    down = block[f"{arch.experts}.down_proj"]
    fused = "gate_up_proj" if layout.gated else "up_proj"
    weight, bias = block[f"{arch.experts}.{fused}"], block.get(f"{arch.experts}.{fused}_bias")
    if layout.transposed:
        weight, down = weight.transpose(1, 2), down.transpose(1, 2)
    gate, up = _split_gate_up(weight, layout)
    gate_bias, up_bias = (None, None) if bias is None else _split_gate_up(bias, layout)
    correction = block.get(arch.correction_bias) if arch.correction_bias else None
    return LayerWeights(
        down_EDF=down,
        down_bias_ED=block.get(f"{arch.experts}.down_proj_bias"),
        gate_EFD=gate,
        up_EFD=up,
        gate_bias_EF=gate_bias,
        up_bias_EF=up_bias,
        router_ED=block[f"{arch.router}.weight"],
        router_bias_E=block.get(arch.router_bias) if arch.router_bias else None,
        correction_bias_E=None if correction is None else correction.reshape(-1),
        scale_E=block.get(arch.expert_scale) if arch.expert_scale else None,
    )


def insert(
    arch: Architecture, weights: LayerWeights, block: Mapping[str, Tensor], layout: ExpertsLayout
) -> dict[str, Tensor]:
    """The MoE block's tensors for new canonical weights: the inverse of `extract`.

    `block` gives the shapes of odd tensors (a correction bias may be [1, E]); its values are not used.
    """
    down, fused = weights.down_EDF, _join_gate_up(weights.gate_EFD, weights.up_EFD, layout)
    if layout.transposed:
        down, fused = down.transpose(1, 2), fused.transpose(1, 2)
    name = "gate_up_proj" if layout.gated else "up_proj"
    new = {
        f"{arch.experts}.down_proj": down,
        f"{arch.experts}.{name}": fused,
        f"{arch.router}.weight": weights.router_ED,
    }
    if weights.up_bias_EF is not None:
        new[f"{arch.experts}.{name}_bias"] = _join_gate_up(weights.gate_bias_EF, weights.up_bias_EF, layout)
    if weights.down_bias_ED is not None:
        new[f"{arch.experts}.down_proj_bias"] = weights.down_bias_ED
    if arch.router_bias and weights.router_bias_E is not None:
        new[arch.router_bias] = weights.router_bias_E
    if arch.correction_bias and weights.correction_bias_E is not None:
        old = block[arch.correction_bias]
        new[arch.correction_bias] = weights.correction_bias_E.reshape(*old.shape[:-1], -1)
    if arch.expert_scale and weights.scale_E is not None:
        new[arch.expert_scale] = weights.scale_E
    return {name: tensor.contiguous() for name, tensor in new.items()}


def _split_gate_up(fused: Tensor, layout: ExpertsLayout) -> tuple[Tensor | None, Tensor]:
    if not layout.gated:
        return None, fused
    if layout.interleaved:
        return fused[:, 0::2], fused[:, 1::2]
    gate, up = fused.chunk(2, dim=1)
    return gate, up


def _join_gate_up(gate: Tensor | None, up: Tensor, layout: ExpertsLayout) -> Tensor:
    if gate is None:
        return up
    if layout.interleaved:
        return torch.stack((gate, up), dim=2).flatten(1, 2)
    return torch.cat((gate, up), dim=1)
