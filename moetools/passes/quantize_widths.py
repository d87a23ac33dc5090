"""Mixed precision: measure what every expert's projections lose at every width, and share out the bits exactly."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import StreamedModel
from moetools.grids.base import Grid
from moetools.methods.allocation import allocate
from moetools.methods.quantize.base import Inputs, energy, importance_of
from moetools.passes.quantize_pass import CalibratedLayer, QuantizePass
from moetools.passes.quantize_places import Place, with_bits
from moetools.text.tokens import TokenData


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Tensors that take one width: an expert's gate and up, or its down (of all experts where they share a tensor)."""

    names: tuple[str, ...]
    weights: int
    cost_J: Tensor


def choose_widths(
    model: StreamedModel,
    data: TokenData,
    plan: MemoryPlan,
    places: Mapping[int | None, Sequence[Place]],
    grids: Mapping[str, Grid],
    *,
    widths: Sequence[int],
    average: float,
    together: bool = False,
) -> dict[str, int]:
    """Bits of the routed experts' tensors with the least total error at `average` bits per code.

    Cost of expert e's projection p at j bits: sum over its slots of g^2 ||f_e(x) - f_e,p,j(x)||^2, only p rounded to
    nearest with j bits, over the mean energy of the hidden states behind the layer, which makes layers comparable. The
    sum of costs is minimised exactly under the bit budget. After MC-MoE (arXiv 2410.06270, section 3.2), whose cost has
    exponents and products of usage statistics; the measured error already holds usage and routing weights.

    Args:
        together: all experts of a layer take one width per projection, as file formats want it that stack them.
    """
    units: list[_Unit] = []
    # Not inference mode: embeddings that are loaded here are quantized in place later.
    with torch.no_grad():
        for layer in QuantizePass(model, data, plan).layers():
            assert isinstance(layer, CalibratedLayer), "nothing is stored"
            here = [place for place in places[layer.index] if place.expert is not None]
            if here:
                units += _units(layer, here, grids, widths, together=together)
    bits_NJ = torch.tensor([[width * unit.weights for width in widths] for unit in units])
    cost_NJ = torch.stack([unit.cost_J for unit in units])
    budget = int(average * sum(unit.weights for unit in units))
    chosen = allocate(cost_NJ, bits_NJ, budget).tolist()
    return {name: widths[choice] for unit, choice in zip(units, chosen, strict=True) for name in unit.names}


def _units(
    layer: CalibratedLayer,
    places: Sequence[Place],
    grids: Mapping[str, Grid],
    widths: Sequence[int],
    *,
    together: bool,
) -> list[_Unit]:
    weights = layer.weights
    assert weights is not None
    layer.linear_inputs([], keep_experts=True)
    everyone = range(weights.num_experts)
    wide, inner = layer.wide_inputs(everyone), layer.inner_inputs(everyone, weights)
    assert wide is not None
    assert inner is not None
    grid = grids[places[0].name]
    rounded = [_rounded(weights, with_bits(grid, width), wide, inner) for width in widths]
    scale = layer.behind_energy() * max(1, layer.num_tokens)
    cost = {
        False: layer.expert_errors([replace(weights, gate_EFD=one.gate_EFD, up_EFD=one.up_EFD) for one in rounded]),
        True: torch.stack([_down_errors(weights, one, inner) for one in rounded]),
    }
    groups: dict[tuple[int | None, bool], list[Place]] = defaultdict(list)
    for place in places:
        assert place.expert is not None
        whose = None if together else place.expert.expert
        groups[whose, place.expert.projection == "down"].append(place)
    found = []
    for (expert, down), members in groups.items():
        cost_J = cost[down].sum(1) if expert is None else cost[down][:, expert]
        size = sum(_weights_of(place, weights.num_experts) for place in members)
        names = tuple(place.name for place in members)
        found.append(_Unit(names=names, weights=size, cost_J=cost_J.double().cpu() / scale))
    return found


def _weights_of(place: Place, experts: int) -> int:
    assert place.expert is not None
    return place.shape[0] * place.shape[1] * (experts if place.expert.expert is None else 1)


def _rounded(weights: LayerWeights, grid: Grid, wide: Inputs, inner: Inputs) -> LayerWeights:
    """All experts rounded to nearest; columns count by the energy they see."""

    def values(weight_EOI: Tensor, inputs: Inputs) -> Tensor:
        return grid.quantize(weight_EOI.float(), importance_of(inputs)).dequantize()

    gate = None if weights.gate_EFD is None else values(weights.gate_EFD, wide)
    return replace(
        weights, gate_EFD=gate, up_EFD=values(weights.up_EFD, wide), down_EDF=values(weights.down_EDF, inner)
    )


def _down_errors(weights: LayerWeights, rounded: LayerWeights, inner: Inputs) -> Tensor:
    lost_E = energy(weights.down_EDF.float() - rounded.down_EDF, inner.hessian_BII)
    return lost_E * inner.count_B.to(lost_E)
