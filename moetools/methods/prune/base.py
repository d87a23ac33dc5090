"""The contract of a pruning method: a score per expert, the best of each router group stay."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.errors import StatisticsError, UserError
from moetools.methods.base import ExpertDecision, ExpertMethod, ExpertTarget, LayerStatistics


class ScorePrune(ExpertMethod):
    """Keeps the `keep / num_groups` experts of each router group that score highest; ties go to the lower index.

    Kept experts stay in ascending order, so router groups stay where they are. `details["scores"]` holds all E scores.

    Experts in `target.protected` are kept before all others, whatever their score. A group with more of them than it
    keeps keeps those that score highest; `details["protected"]` and `details["protected_dropped"]` say which were
    protected and which of them had to go all the same.
    """

    router = "centroid"

    @abstractmethod
    def scores(self, statistics: LayerStatistics, target: ExpertTarget) -> Float[Tensor, "E"]:
        """The score of every expert, higher is worth more; finite."""

    def plan(self, statistics: LayerStatistics, target: ExpertTarget) -> ExpertDecision:
        scores = self.scores(statistics, target).tolist()
        kept: list[int] = []
        for members in target.group_members():
            ranked = sorted(members, key=lambda expert: (expert not in target.protected, -scores[expert], expert))
            kept += sorted(ranked[: target.keep_per_group])
        details: dict[str, object] = {"scores": scores}
        if target.protected:
            details["protected"] = sorted(target.protected)
            details["protected_dropped"] = sorted(expert for expert in target.protected if expert not in kept)
        return keep_decision(kept, details)


def super_experts(peaks_by_layer: Mapping[int, Float[Tensor, "E"]]) -> dict[int, tuple[int, ...]]:
    """The few experts of a model whose activations are so large that it cannot lose them, by layer.

    Expert e of layer l is one if peak_le > max(P99.5, 0.1 * max), peak_le = largest |f_e(x)_d| over calibration
    (`peak` of the statistic "max_activation"), P99.5 and max taken over all experts of all layers. Layers without
    one have an empty tuple; experts ascend. Goes into `ExpertTarget.protected`.

    Raises:
        StatisticsError: a peak is not finite.

    Source: super experts (arXiv 2507.23279); the guard in the published code of REAP (arXiv 2510.13999).
    """
    peaks = {layer: peak_E.detach().cpu().double() for layer, peak_E in peaks_by_layer.items()}
    for layer, peak_E in peaks.items():
        if not peak_E.isfinite().all():
            raise StatisticsError(
                f"layer {layer}: statistic 'max_activation' (peak) is not finite",
                hint="the weights hold NaN or infinity, or a float16 pass overflowed: try `dtype=float32`",
            )
    if not peaks:
        return {}
    every = torch.cat(list(peaks.values()))
    threshold = torch.maximum(every.quantile(0.995), 0.1 * every.max())
    return {layer: tuple((peak_E > threshold).nonzero()[:, 0].tolist()) for layer, peak_E in peaks.items()}


def keep_exactly(kept: Sequence[int], target: ExpertTarget) -> ExpertDecision:
    """The decision that keeps a given list of experts, in ascending order.

    Raises:
        UserError: an expert is listed twice or does not exist, the list does not have `target.keep` entries, or the
            router groups would keep different numbers of experts.
    """
    where = f"layer {target.layer}"
    outside = [expert for expert in kept if not 0 <= expert < target.num_experts]
    if outside:
        raise UserError(f"{where}: no expert {outside[0]}; legal: 0 to {target.num_experts - 1}")
    twice = sorted({expert for expert in kept if kept.count(expert) > 1})
    if twice:
        raise UserError(f"{where}: expert {twice[0]} is listed more than once")
    if len(kept) != target.keep:
        raise UserError(f"{where}: {len(kept)} experts listed, {target.keep} wanted")
    counts = [sum(expert in members for expert in kept) for members in target.group_members()]
    if len(set(counts)) > 1:
        raise UserError(
            f"{where}: the router groups would keep {', '.join(map(str, counts))} experts",
            hint=f"list {target.keep_per_group} experts of each of the {target.num_groups} groups",
        )
    return keep_decision(sorted(kept), {})


class KeepListed(ExpertMethod):
    """Keeps the experts it was told to keep, whatever was measured; see `keep_exactly`.

    Args:
        every: experts to keep in layers that have no list of their own.
        layers: layer -> experts to keep.
    """

    name = "explicit"
    router = "centroid"

    def __init__(self, *, every: Sequence[int] | None, layers: Mapping[int, Sequence[int]]) -> None:
        self._every, self._layers = every, layers

    def plan(self, statistics: LayerStatistics, target: ExpertTarget) -> ExpertDecision:  # noqa: ARG002
        listed = self._layers.get(target.layer, self._every)
        if listed is None:
            raise UserError(f"layer {target.layer}: no experts are listed")
        return keep_exactly(listed, target)


def keep_decision(kept: Sequence[int], details: dict[str, object]) -> ExpertDecision:
    """Every kept expert alone in its cluster, its router row unchanged."""
    clusters = tuple((expert,) for expert in kept)
    return ExpertDecision(clusters=clusters, weights=((1.0,),) * len(clusters), router="centroid", details=details)
