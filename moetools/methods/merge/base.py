"""The contract of a merging method: a partition of each router group into clusters, and weights inside a cluster."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertDecision, ExpertMethod, ExpertTarget, LayerStatistics, read_quantity

Weighting = Literal["equal", "frequency", "saliency"]


class ClusterMerge(ExpertMethod):
    """Partitions the experts of each router group into `keep / num_groups` clusters and averages each cluster.

    Inside a cluster the most important expert comes first (the centroid), the others follow in ascending order: the
    most used one, or the most salient where members are weighted by saliency. Clusters are ordered by their smallest
    expert inside each group, so keeping all experts changes nothing. `details["slots"]` holds the slots of all E
    experts in the calibration data; `details["saliency"]` their saliency where it was used.

    Attributes:
        weighting: members count equally, in proportion to their slots, or to their saliency; see `shares`.
        saliency: the statistic that measures it.
    """

    needs: ClassVar[tuple[str, ...]] = ("load",)
    weighting: ClassVar[Weighting] = "frequency"
    saliency: ClassVar[str] = "reap"

    @abstractmethod
    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        """`members`, the experts of one group, in `target.keep_per_group` clusters that are not empty."""

    def plan(self, statistics: LayerStatistics, target: ExpertTarget) -> ExpertDecision:
        importance = slots_of(statistics, target)
        details: dict[str, object] = {"slots": importance}
        if self.weighting == "saliency":
            importance = saliency_of(statistics, target, self.saliency)
            details["saliency"] = importance
        clusters: list[tuple[int, ...]] = []
        for members in target.group_members():
            parts = self.partition(statistics, target, members)
            assert len(parts) == target.keep_per_group
            assert sorted(expert for part in parts for expert in part) == members
            clusters += [centroid_first(part, importance) for part in sorted(parts, key=min)]
        weights = tuple(shares(cluster, importance, self.weighting) for cluster in clusters)
        # Fitted rows are made later, from what `combine_experts` leaves: the mean.
        router: Literal["mean", "centroid"] = "centroid" if self.router == "centroid" else "mean"
        return ExpertDecision(clusters=tuple(clusters), weights=weights, router=router, details=details)


def slots_of(statistics: LayerStatistics, target: ExpertTarget) -> list[float]:
    """Slots n_e of every expert in the calibration data, tasks pooled (statistic "load")."""
    return read_quantity(statistics, target, "load", "slots", expert_dim=1).sum(0).tolist()


def saliency_of(statistics: LayerStatistics, target: ExpertTarget, statistic: str = "reap") -> list[float]:
    """Saliency S_e of every expert, tasks pooled."""
    return read_quantity(statistics, target, statistic, "saliency").tolist()


def by_importance(experts: Sequence[int], importance: Sequence[float]) -> list[int]:
    """The most important expert first; ties by index."""
    return sorted(experts, key=lambda expert: (-importance[expert], expert))


def centroid_first(part: Sequence[int], importance: Sequence[float]) -> tuple[int, ...]:
    """The most important expert (ties: the lowest), then the others in ascending order."""
    centroid = by_importance(part, importance)[0]
    return centroid, *sorted(expert for expert in part if expert != centroid)


def shares(cluster: Sequence[int], importance: Sequence[float], weighting: Weighting) -> tuple[float, ...]:
    """Weights of a cluster's members, summing to 1: importance_e / sum over the cluster, or 1 / members.

    Equal as well where no member has any importance (none of them was ever used).
    """
    total = sum(importance[expert] for expert in cluster)
    if weighting == "equal" or not total:
        return (1 / len(cluster),) * len(cluster)
    return tuple(importance[expert] / total for expert in cluster)


def join_dominant(
    members: Sequence[int], importance: Sequence[float], similarity_EE: Float[Tensor, "E E"], count: int
) -> list[list[int]]:
    """Clusters around the `count` most important members: every other one joins the most similar of them.

    Ties go to the more important.
    """
    ranked = by_importance(members, importance)
    dominant = ranked[:count]
    clusters = [[expert] for expert in dominant]
    for expert in ranked[count:]:
        likeness = similarity_EE[expert, torch.tensor(dominant)].tolist()
        clusters[likeness.index(max(likeness))].append(expert)
    return clusters


def deal(ranked: Sequence[int], count: int) -> list[list[int]]:
    """Experts dealt out to `count` hands in snake order: 0, 1 .. count-1, count-1 .. 1, 0, and so on."""
    hands: list[list[int]] = [[] for _ in range(count)]
    for rank, expert in enumerate(ranked):
        lap, place = divmod(rank, count)
        hands[place if lap % 2 == 0 else count - 1 - place].append(expert)
    return hands
