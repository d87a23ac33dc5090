"""Average: merge experts without looking at what they compute. The baseline every clustering must beat."""

from moetools.methods.base import ExpertTarget, LayerStatistics
from moetools.methods.merge.base import ClusterMerge, by_importance, deal, slots_of


class Average(ClusterMerge):
    """Deals the experts of a router group out by load, in snake order, and takes the plain mean of each hand.

    Experts are ranked by slots (statistic "load", most used first, ties by index). With k = keep / num_groups clusters,
    the k most used start the clusters 0, 1 .. k-1, the next k join the clusters k-1 .. 1, 0, and so on, so that the
    clusters carry similar loads. Members count equally, whatever their load. keep = 1 is the plain mean of all experts.
    Similarity between experts plays no part.
    """

    name = "average"
    weighting = "equal"

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        return deal(by_importance(members, slots_of(statistics, target)), target.keep_per_group)


METHOD = Average()
