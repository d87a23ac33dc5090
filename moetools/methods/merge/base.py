"""The contract of a merging method: a partition of each router group into clusters, and weights inside a cluster."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from moetools.methods.base import ExpertDecision, ExpertMethod, ExpertTarget, LayerStatistics, read_quantity


class ClusterMerge(ExpertMethod):
    """Partitions the experts of each router group into `keep / num_groups` clusters and averages each cluster.

    Inside a cluster the most used expert comes first (the centroid), the others follow in ascending order. Clusters are
    ordered by their smallest expert inside each group, so keeping all experts changes nothing. Router rows are averaged
    with the same weights. `details["slots"]` holds the slots of all E experts in the calibration data.

    Attributes:
        frequency_weighted: members count in proportion to their slots; otherwise equally.
    """

    needs: ClassVar[tuple[str, ...]] = ("load",)
    frequency_weighted: ClassVar[bool]

    @abstractmethod
    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        """`members`, the experts of one group, in `target.keep_per_group` clusters that are not empty."""

    def plan(self, statistics: LayerStatistics, target: ExpertTarget) -> ExpertDecision:
        slots = slots_of(statistics, target)
        shares = by_frequency if self.frequency_weighted else equally
        clusters: list[tuple[int, ...]] = []
        for members in target.group_members():
            parts = self.partition(statistics, target, members)
            assert len(parts) == target.keep_per_group
            assert sorted(expert for part in parts for expert in part) == members
            clusters += [centroid_first(part, slots) for part in sorted(parts, key=min)]
        weights = tuple(shares(cluster, slots) for cluster in clusters)
        return ExpertDecision(clusters=tuple(clusters), weights=weights, router="mean", details={"slots": slots})


def slots_of(statistics: LayerStatistics, target: ExpertTarget) -> list[float]:
    """Slots n_e of every expert in the calibration data, tasks pooled (statistic "load")."""
    return read_quantity(statistics, target, "load", "slots", expert_dim=1).sum(0).tolist()


def centroid_first(part: Sequence[int], slots: Sequence[float]) -> tuple[int, ...]:
    """The most used expert (ties: the lowest), then the others in ascending order."""
    centroid = min(part, key=lambda expert: (-slots[expert], expert))
    return centroid, *sorted(expert for expert in part if expert != centroid)


def by_frequency(cluster: Sequence[int], slots: Sequence[float]) -> tuple[float, ...]:
    """n_e / sum of n over the cluster; equal shares if none of its experts was ever used."""
    total = sum(slots[expert] for expert in cluster)
    return tuple(slots[expert] / total for expert in cluster) if total else equally(cluster, slots)


def equally(cluster: Sequence[int], slots: Sequence[float]) -> tuple[float, ...]:  # noqa: ARG001
    """1 / number of members, for each."""
    return (1 / len(cluster),) * len(cluster)
