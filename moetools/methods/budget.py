"""How many experts each layer would keep if only their sum over all layers were given."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.errors import StatisticsError, UserError
from moetools.methods.base import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Experts per layer, and what dropping the others loses.

    Attributes:
        measure: what was measured of an expert: "routed output" or "routed slots".
        experts: layer -> experts it keeps.
        lost: mean over layers of the share of a layer's total that the dropped experts had.
        lost_uniform: the same if every layer keeps equally many.
    """

    measure: str
    experts: Mapping[int, int]
    lost: float
    lost_uniform: float


def expert_mass(statistics: LayerStatistics) -> tuple[str, Float[Tensor, "E"]] | None:
    """What every expert of a layer contributes, and its name: the best that was measured; None if nothing was.

    The sum over tokens of g_e(x) * ||f_e(x)|| (statistic "reap"), else the number of slots (statistic "load").
    """
    if "reap" in statistics:
        return "routed output", statistics["reap"]["weighted_norm"].double().reshape(-1, _experts(statistics)).sum(0)
    if "load" in statistics:
        return "routed slots", statistics["load"]["slots"].double().sum(0)
    return None


def spread_budget(
    masses: Mapping[int, Float[Tensor, "E"]], *, measure: str, keep: int, least: int, num_groups: int = 1
) -> Budget:
    """The numbers of experts, `keep` per layer on average, that lose least: min sum over layers of l(k_l) / l(0).

    l(k) is the mass of the experts a layer drops when it keeps the best k, equally many in every router group. Each
    further round of experts (one per group) gains less than the one before, so taking the best round of any layer, one
    after the other, is optimal.

    Args:
        masses: layer -> what each expert contributes; none is negative.
        keep: experts per layer if all had equally many.
        least: experts every layer keeps at least; a multiple of `num_groups`, as is `keep`.

    Raises:
        StatisticsError: a mass is negative or not finite.
        UserError: `keep` is below `least` or above a layer's experts.
    """
    gains = {layer: _gains(layer, mass_E, num_groups) for layer, mass_E in masses.items()}
    if any(not least <= keep <= len(mass_E) for mass_E in masses.values()):
        raise UserError(f"{keep} experts per layer are not between {least} and what every layer has")
    rounds = dict.fromkeys(masses, least // num_groups)
    for _ in range((keep - least) // num_groups * len(masses)):
        open_layers = [layer for layer in masses if rounds[layer] < len(gains[layer])]
        best = max(open_layers, key=lambda layer: gains[layer][rounds[layer]])
        rounds[best] += 1
    uniform = dict.fromkeys(masses, keep // num_groups)
    return Budget(
        measure=measure,
        experts={layer: count * num_groups for layer, count in rounds.items()},
        lost=_lost(gains, rounds),
        lost_uniform=_lost(gains, uniform),
    )


def _experts(statistics: LayerStatistics) -> int:
    return statistics["reap"]["saliency"].shape[0]


def _gains(layer: int, mass_E: Float[Tensor, "E"], num_groups: int) -> list[float]:
    """Share of the layer's mass that each round of experts brings, the best round first."""
    if not (mass_E.isfinite().all() and (mass_E >= 0).all()):
        raise StatisticsError(f"layer {layer}: what the experts contribute is negative or not finite")
    ranked_GM = mass_E.double().reshape(num_groups, -1).sort(1, descending=True).values
    return (ranked_GM.sum(0) / mass_E.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist()


def _lost(gains: Mapping[int, list[float]], rounds: Mapping[int, int]) -> float:
    return sum(sum(gains[layer][count:]) for layer, count in rounds.items()) / len(rounds)
