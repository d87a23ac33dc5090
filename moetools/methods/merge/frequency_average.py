"""Frequency average: merge experts in proportion to their use, without looking at what they compute. A baseline."""

from moetools.methods.base import ExpertTarget, LayerStatistics
from moetools.methods.merge.base import ClusterMerge, by_importance, deal, slots_of


class FrequencyAverage(ClusterMerge):
    """Deals the experts of a router group out by slots n_e, in snake order; each hand becomes sum n_e W_e / sum n_e.

    n_e is the number of slots expert e received (statistic "load"). keep = 1 is the frequency-weighted mean of all
    experts. Similarity between experts plays no part.
    """

    name = "frequency-average"
    weighting = "frequency"

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        return deal(by_importance(members, slots_of(statistics, target)), target.keep_per_group)


METHOD = FrequencyAverage()
