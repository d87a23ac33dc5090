"""Saliency average: merge experts in proportion to REAP saliency, without looking at similarity. A baseline."""

from moetools.methods.base import FEW_TOKENS, ExpertTarget, LayerStatistics
from moetools.methods.merge.base import ClusterMerge, by_importance, deal, saliency_of


class SaliencyAverage(ClusterMerge):
    """Deals the experts of a router group out by S_e, in snake order, and takes sum S_e W_e / sum S_e of each hand.

    S_e is the mean of g_e(x) * ||f_e(x)||_2 over the tokens routed to e (`saliency` of the statistic "reap"). keep = 1
    is the saliency-weighted mean of all experts.
    """

    name = "saliency-average"
    needs = ("load", "reap")
    min_tokens = FEW_TOKENS
    weighting = "saliency"

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        return deal(by_importance(members, saliency_of(statistics, target)), target.keep_per_group)


METHOD = SaliencyAverage()
