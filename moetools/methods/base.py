"""The contract of a method that decides which experts of a layer stay and how they are combined."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.errors import StatisticsError, UserError

FEW_TOKENS = 32
"""A mean over fewer tokens than this is noise: the bound of the methods that read a mean per expert."""
LayerStatistics = Mapping[str, Mapping[str, Tensor]]
"""Finalized statistics of one layer: statistic name -> quantity name -> tensor."""


@dataclass(frozen=True, kw_only=True)
class ExpertTarget:
    """What is asked of one layer.

    Attributes:
        num_experts: experts the layer has now.
        keep: experts it must have afterwards.
        num_groups: router groups (n_group) of group-limited routing, else 1. Experts stay in their group and every
            group keeps `keep / num_groups` of them, because the router addresses groups by position.
        layer: index of the decoder layer (for messages and seeds).
        seed: for methods that draw at random.
        protected: experts that pruning by score keeps before all others (`moetools.methods.prune.base.super_experts`).

    Raises:
        UserError: `keep` is not in 1 .. num_experts, the groups cannot keep equally many experts, or a protected
            expert does not exist.
    """

    num_experts: int
    keep: int
    num_groups: int = 1
    layer: int
    seed: int = 0
    protected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"layer {self.layer}"
        outside = [expert for expert in self.protected if not 0 <= expert < self.num_experts]
        if outside:
            raise UserError(f"{where}: cannot protect expert {outside[0]}; legal: 0 to {self.num_experts - 1}")
        if not 1 <= self.keep <= self.num_experts:
            raise UserError(f"{where}: cannot keep {self.keep} experts; legal: 1 to {self.num_experts}")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise UserError(f"{where}: {self.num_experts} experts do not form {self.num_groups} equal router groups")
        if self.keep % self.num_groups:
            lower = self.keep - self.keep % self.num_groups
            nearest = [count for count in (lower, lower + self.num_groups) if count]
            raise UserError(
                f"{where}: cannot keep {self.keep} experts in {self.num_groups} router groups; "
                f"legal: multiples of {self.num_groups}",
                hint=f"keep {' or '.join(map(str, nearest))} experts",
            )

    @property
    def keep_per_group(self) -> int:
        return self.keep // self.num_groups

    def group_members(self) -> list[list[int]]:
        """Experts of each group, in order."""
        size = self.num_experts // self.num_groups
        return [list(range(group * size, (group + 1) * size)) for group in range(self.num_groups)]


@dataclass(frozen=True, kw_only=True)
class ExpertDecision:
    """How the new experts of one layer are made from the old ones; goes into the report as it is.

    Attributes:
        clusters: new expert i is the weighted sum of the old experts `clusters[i]`. Pruning: one member each.
        weights: the weights of each cluster's members, summing to 1.
        router: "mean" (weighted mean of the members' rows) or "centroid" (the row of the cluster's first member).
        details: method-specific facts for the report (scores, thresholds), JSON-able.
    """

    clusters: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    router: Literal["mean", "centroid"] = "mean"
    details: Mapping[str, object]

    def __post_init__(self) -> None:
        members = [expert for cluster in self.clusters for expert in cluster]
        assert all(self.clusters), "a cluster must not be empty"
        assert len(set(members)) == len(members), "clusters must be disjoint"
        assert [len(row) for row in self.weights] == [len(row) for row in self.clusters], "one weight per member"
        assert all(abs(sum(row) - 1) < 1e-6 for row in self.weights), "the weights of a cluster must sum to 1"

    @property
    def kept(self) -> list[int]:
        """The old number of every new expert, where each is one of the old."""
        return [expert for (expert,) in self.clusters]


Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""route(logits_NC, kept_C) -> (index_NK, weight_NK): the model's own routing when only the experts `kept_C` are there.

`logits_NC` are their columns of the router logits, `kept_C` their ascending numbers in the full layer (for tensors like
a correction bias, which the caller slices the same way). `index_NK` counts columns, 0 <= index < C.
"""


@dataclass(frozen=True, kw_only=True)
class LayerSample:
    """A sample of N calibration tokens at the input of one MoE block, and how the family computes with them.

    Attributes:
        hidden_ND: input of the block (after its norm).
        logits_NE: router logits of those tokens, fp32.
        activate: (gate [N, F] or None for experts without a gate, up [N, F]) -> the intermediate [N, F].
        route: the family's routing among some of the experts.
    """

    hidden_ND: Float[Tensor, "N D"]
    logits_NE: Float[Tensor, "N E"]
    activate: Callable[[Tensor | None, Tensor], Tensor]
    route: Route

    def intermediate(self, weights: LayerWeights, expert: int) -> Float[Tensor, "N F"]:
        """act(gate_e x + gate_bias_e) * (up_e x + up_bias_e) of ALL sampled tokens, fp32 on the weights' device."""
        hidden_ND = self.hidden_ND.to(weights.up_EFD.device).float()

        def projected(weight_EFD: Tensor, bias_EF: Tensor | None) -> Tensor:
            result_NF = hidden_ND @ weight_EFD[expert].float().T
            return result_NF if bias_EF is None else result_NF + bias_EF[expert].float()

        gate_EFD = weights.gate_EFD
        gate_NF = None if gate_EFD is None else projected(gate_EFD, weights.gate_bias_EF)
        return self.activate(gate_NF, projected(weights.up_EFD, weights.up_bias_EF))

    def output(self, weights: LayerWeights, expert: int) -> Float[Tensor, "N D"]:
        """f_e(x) of all sampled tokens, routed to e or not, ungated, fp32."""
        result_ND = self.intermediate(weights, expert) @ weights.down_EDF[expert].float().T
        return result_ND if weights.down_bias_ED is None else result_ND + weights.down_bias_ED[expert].float()

    def rows(self, rows: slice) -> "LayerSample":
        """The same for some of the tokens."""
        return replace(self, hidden_ND=self.hidden_ND[rows], logits_NE=self.logits_NE[rows])


class ExpertMethod(ABC):
    """A method that reduces the number of experts of a layer.

    Attributes:
        name: the plug-in's file name, with `-` for `_`.
        needs: names of the statistics `plan` reads; checked before any weight is loaded.
        combine: how a new expert is made of its members: "average", "subspace" or "neurons".
        rank: share of the rank that "subspace" keeps.
        router: rows of the new router: "mean", "centroid" or "fitted".
        refit: "none", or how the down projections are solved anew: "joint" (all together) or "members" (each towards
            its members' mean output).
        sequential: whether statistics are measured behind the already compressed layers.
        align: whether members' neurons are put in their centroid's order before averaging (`methods.alignment`).
        needs_sample: the decision needs `plan_with_sample`; `plan` refuses.
        min_tokens: calibration tokens an expert needs for what the method reads about it; 0 where none are needed, or
            where few tokens are themselves what it looks for.
        guarded: super experts are to be protected (`ExpertTarget.protected`) where the statistic "max_activation" of
            the whole model is at hand.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    combine: ClassVar[str] = "average"
    rank: ClassVar[float] = 1.0
    router: ClassVar[str] = "mean"
    refit: ClassVar[str] = "none"
    sequential: ClassVar[bool] = False
    align: ClassVar[bool] = False
    needs_sample: ClassVar[bool] = False
    min_tokens: ClassVar[int] = 0
    guarded: ClassVar[bool] = False

    @abstractmethod
    def plan(self, statistics: LayerStatistics, target: ExpertTarget) -> ExpertDecision:
        """Decide from finalized statistics alone.

        Raises:
            StatisticsError: a statistic in `needs` is missing, belongs to another layer size, or is not finite.
        """

    def plan_with_sample(
        self,
        statistics: LayerStatistics,
        target: ExpertTarget,
        weights: LayerWeights,  # noqa: ARG002
        sample: LayerSample,  # noqa: ARG002
    ) -> ExpertDecision:
        """Decide with the layer's weights and a sample of its inputs at hand; `plan` unless `needs_sample`.

        Raises:
            StatisticsError: as `plan`, or the sample belongs to another layer or is not finite.
        """
        return self.plan(statistics, target)


def read_quantity(
    statistics: LayerStatistics, target: ExpertTarget, statistic: str, quantity: str, *, expert_dim: int = 0
) -> Float[Tensor, "..."]:
    """One finalized quantity on the CPU in fp64, checked.

    Raises:
        StatisticsError: it is missing, does not have `target.num_experts` entries along `expert_dim`, or holds a value
            that is not finite.
    """
    name = f"layer {target.layer}: statistic '{statistic}' ({quantity})"
    if statistic not in statistics or quantity not in statistics[statistic]:
        raise StatisticsError(f"{name} is missing; measured: {', '.join(statistics) or 'none'}")
    value = statistics[statistic][quantity].detach().cpu().double()
    if value.shape[expert_dim] != target.num_experts:
        raise StatisticsError(
            f"{name} is for {value.shape[expert_dim]} experts, the layer has {target.num_experts}",
            hint="the statistics were measured on another model; measure them again",
        )
    bad = sorted(set(value.movedim(expert_dim, 0).isfinite().logical_not().nonzero()[:, 0].tolist()))
    if bad:
        raise StatisticsError(
            f"{name} is not finite for experts {', '.join(map(str, bad))}",
            hint="the weights hold NaN or infinity, or a float16 pass overflowed: try `dtype=float32`",
        )
    return value


PROJECTIONS = ("gate_EFD", "up_EFD", "down_EDF")
Mean = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""(tensors of the members, their shares) -> one tensor of the same shape, fp32."""


def combine_experts(
    weights: LayerWeights, decision: ExpertDecision, *, projections: Mean | None = None
) -> LayerWeights:
    """Weighted sums of experts: W'_i = sum_j w_ij * W_{c_ij}, in fp32 and rounded once to the input's dtype.

    c_i = `decision.clusters[i]`, w_i = `decision.weights[i]`. Expert tensors always follow the formula; router tensors
    follow `decision.router`. A cluster with one member is copied bit for bit, and so is one of identical members. Peak
    memory beyond the result is a few single experts in fp32.

    Args:
        projections: another mean for the gate, up and down matrices.
    """
    firsts = torch.tensor([cluster[0] for cluster in decision.clusters])
    if all(len(cluster) == 1 for cluster in decision.clusters):
        return weights.select(firsts)

    def combined(name: str, tensor: Tensor) -> Tensor:
        result = tensor.index_select(0, firsts.to(tensor.device))
        if name in LayerWeights.ROUTER_FIELDS and decision.router == "centroid":
            return result
        mean = projections if projections is not None and name in PROJECTIONS else weighted_mean
        for row, (members, shares) in enumerate(zip(decision.clusters, decision.weights, strict=True)):
            if len(members) > 1:
                result[row] = mean([tensor[member] for member in members], shares)
        return result

    return LayerWeights(**{name: combined(name, tensor) for name, tensor in weights.tensors().items()})


def weighted_mean(tensors: Sequence[Float[Tensor, "..."]], shares: Sequence[float]) -> Float[Tensor, "..."]:
    """sum_j shares[j] * tensors[j], shares summing to 1, in fp32.

    Computed as x_0 + sum_j shares[j] * (x_j - x_0), which returns identical tensors without a rounding error.
    """
    first = tensors[0].float()
    total = first.clone()
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total.add_(tensor.float() - first, alpha=share)
    return total
