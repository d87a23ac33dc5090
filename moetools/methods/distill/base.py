"""The contract of an initialisation: one dense FFN from the experts of one MoE layer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import LayerWeights, WideExpert, join_experts, stack_experts
from moetools.methods.base import ExpertTarget, LayerSample, LayerStatistics, read_quantity, weighted_mean

Scaling = Literal["uniform", "marginal"]


@dataclass(frozen=True, kw_only=True)
class MoeView:
    """What an initialisation may look at.

    Attributes:
        layer: index of the decoder layer (for messages and seeds).
        width: neurons W wanted for the routed experts' part of the FFN.
        top_k: experts per token.
        weights: the routed experts.
        statistics: finalized, of this layer.
        sample: inputs of the block.
        scaling: how an expert's neurons are scaled down; see `expert_scale`.
        seed: for what is drawn at random.
    """

    layer: int
    width: int
    top_k: int
    weights: LayerWeights
    statistics: LayerStatistics
    sample: LayerSample
    scaling: Scaling = "uniform"
    seed: int = 0

    @property
    def num_experts(self) -> int:
        return self.weights.num_experts

    def quantity(self, statistic: str, name: str, *, expert_dim: int = 0) -> Float[Tensor, "..."]:
        """A finalized quantity, checked, fp64 on the CPU."""
        target = ExpertTarget(num_experts=self.num_experts, keep=1, layer=self.layer)
        return read_quantity(self.statistics, target, statistic, name, expert_dim=expert_dim)

    def slots(self) -> Float[Tensor, "E"]:
        """Slots of every expert, tasks pooled."""
        return self.quantity("load", "slots", expert_dim=1).sum(0)

    def gate_mass(self) -> Float[Tensor, "E"]:
        """E_x[g_e(x) 1(e is selected)]: the mean over all tokens of the weight the model used."""
        mass_GE = self.quantity("router", "gate_mass", expert_dim=1)
        return mass_GE.sum(0) / self.slots().sum().clamp_min(1) * self.top_k

    def expert_scale(self) -> Float[Tensor, "E"]:
        """Factors of the experts' outputs that stand in for the routing weights.

        "uniform": the mean total weight of a token over K (1/K for routers that normalise, times
        routed_scaling_factor); "marginal": `gate_mass`.
        """
        mass_E = self.gate_mass()
        return mass_E if self.scaling == "marginal" else torch.full_like(mass_E, mass_E.sum().item() / self.top_k)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1009 + self.layer)


class DenseInit(ABC):
    """A way to initialise the FFN.

    Attributes:
        name: the plug-in's file name, with `-` for `_`.
        needs: names of the statistics it reads.
        wide: the result has more neurons than asked for; the warm start chooses among them.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("load", "router")
    wide: ClassVar[bool] = False

    @abstractmethod
    def build(self, view: MoeView) -> WideExpert:
        """The FFN, fp32, with `view.width` neurons (more if `wide`).

        Raises:
            StatisticsError: a statistic in `needs` is missing, belongs to another layer size, or is not finite.
        """


def average(weights: LayerWeights, members: Sequence[int], shares: Sequence[float]) -> WideExpert:
    """One expert whose weights are the weighted mean of the members' (shares sum to 1), in fp32."""
    parts = [stack_experts(weights, (member,)) for member in members]

    def mean(name: str) -> Tensor:
        return weighted_mean([getattr(part, name) for part in parts], shares)

    first = parts[0]
    present = {name: mean(name) for name, tensor in first.__dict__.items() if tensor is not None}
    return replace(first, **present)


def largest_neurons(ffn: WideExpert, count: int) -> WideExpert:
    """The `count` neurons with the largest product of the norms of their gate row, up row and down column."""
    size_W = ffn.up_WD.norm(dim=1) * ffn.down_DW.norm(dim=0)
    if ffn.gate_WD is not None:
        size_W = size_W * ffn.gate_WD.norm(dim=1)
    return ffn if count >= ffn.width else ffn.only(size_W.topk(count).indices.sort().values)


def concatenate(parts: Sequence[WideExpert], width: int) -> WideExpert:
    """Whole parts side by side while they fit, then the largest neurons of the next one."""
    chosen: list[WideExpert] = []
    for part in parts:
        room = width - sum(one.width for one in chosen)
        if room > 0:
            chosen.append(largest_neurons(part, min(room, part.width)))
    return join_experts(chosen)


def fit_width(ffn: WideExpert, width: int, generator: torch.Generator) -> WideExpert:
    """The same FFN with fewer neurons (the largest), or with more: random rows whose down columns are zero.

    Added neurons change nothing until training gives their down columns a value.
    """
    if ffn.width >= width:
        return largest_neurons(ffn, width)
    extra, hidden = width - ffn.width, ffn.up_WD.shape[1]

    def drawn(like_WD: Tensor) -> Tensor:
        scale = like_WD.square().mean().sqrt()
        return scale * torch.randn(extra, hidden, generator=generator).to(like_WD)

    padding = WideExpert(
        up_WD=drawn(ffn.up_WD),
        down_DW=ffn.down_DW.new_zeros(hidden, extra),
        gate_WD=None if ffn.gate_WD is None else drawn(ffn.gate_WD),
    )
    return join_experts((ffn, padding))


def contribution(view: MoeView) -> Float[Tensor, "E"]:
    """CP_e: mean weight that the tokens which select e give it (0 for an expert that was never used)."""
    mass_E = view.quantity("router", "gate_mass", expert_dim=1).sum(0)
    return mass_E / view.slots().clamp_min(1)


def output_gram(view: MoeView) -> Float[Tensor, "E E"]:
    """G_ij = E_x <f_i(x), f_j(x)> over the sampled tokens, every expert on every token; fp64 on the CPU."""
    outputs = [view.sample.output(view.weights, expert).flatten() for expert in range(view.num_experts)]
    stacked = torch.stack(outputs).double()
    return (stacked @ stacked.T / len(view.sample.hidden_ND)).cpu()


def best_experts(view: MoeView, score_E: Float[Tensor, "E"]) -> WideExpert:
    """The experts of highest score, scaled and side by side, as many as fit into the width."""
    order = score_E.argsort(descending=True, stable=True).tolist()
    return chosen_experts(view, order)


def chosen_experts(view: MoeView, order: Sequence[int]) -> WideExpert:
    """The given experts, scaled and side by side, as many as fit into the width."""
    scale_E = view.expert_scale()
    parts = [stack_experts(view.weights, (expert,)).scaled(scale_E[expert].item()) for expert in order]
    return fit_width(concatenate(parts, view.width), view.width, view.generator())


def averaged(view: MoeView, weights: LayerWeights, importance_E: Float[Tensor, "E"]) -> WideExpert:
    """The weighted mean of all experts, times the mean total routing weight, brought to the width."""
    total = importance_E.sum().clamp_min(torch.finfo(torch.float64).tiny)
    shares = importance_E / total if importance_E.any() else torch.full_like(importance_E, 1 / len(importance_E))
    ffn = average(weights, range(view.num_experts), shares.tolist()).scaled(view.gate_mass().sum().item())
    return fit_width(ffn, view.width, view.generator())
