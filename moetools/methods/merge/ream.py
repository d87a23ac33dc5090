"""REAM: the most salient experts absorb the experts most similar to them, most of them none."""

import math

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.merge.base import ClusterMerge, by_importance, saliency_of

GROUP_SIZE = 16
"""C, the most experts in a cluster; the default of the authors' code."""


class Ream(ClusterMerge):
    """Centroids by REAP saliency S_e; in that order each absorbs its nearest free non-centroids, up to C in a cluster.

    The k = keep / num_groups experts of highest S_e in each router group (of M experts) are the centroids. From the
    most salient to the least, each takes the most similar of the non-centroids that are still free until its cluster
    has C = max(16, ceil(M / k)) members or none are left: a few large clusters, most centroids stay alone
    ("pseudo-pruning": the absorbed experts weigh little beside their centroid). Similarity of i and j: the mean of

        the correlation of their router logits (`similarity` of the statistic "router_similarity"), and
        the cosine of their gated outputs (`cosine` of the statistic "gated_similarity").

    Merged expert: sum of S_e W_e / sum of S_e over the cluster, neurons aligned to the centroid's first. The router
    keeps the centroid's row. Ties go to the lower index.

    Differences from the authors' code: it runs all experts on all tokens, ours reads the routed ones; it rescales both
    similarities to [0, 1] and takes the distance of uncentred logits for the first; and C grows where 16 could not
    take up all experts, where it stops with an error.

    Source: REAM (arXiv 2604.04356).
    """

    name = "ream"
    needs = ("load", "reap", "router_similarity", "gated_similarity")
    weighting = "saliency"
    router = "centroid"
    align = True
    sequential = True

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        by_router_EE = read_quantity(statistics, target, "router_similarity", "similarity")
        by_output_EE = read_quantity(statistics, target, "gated_similarity", "cosine")
        similarity = ((by_router_EE + by_output_EE) / 2).tolist()
        ranked = by_importance(members, saliency_of(statistics, target))
        count = target.keep_per_group
        size = max(GROUP_SIZE, math.ceil(len(members) / count))
        return absorb(ranked[:count], sorted(ranked[count:]), similarity, size)


def absorb(centroids: list[int], free: list[int], similarity: list[list[float]], size: int) -> list[list[int]]:
    """Clusters of at most `size` experts: each centroid, in order, takes the most similar of the experts still free."""
    clusters = []
    for centroid in centroids:
        nearest = by_importance(free, similarity[centroid])[: size - 1]
        clusters.append([centroid, *nearest])
        free = [expert for expert in free if expert not in nearest]
    assert not free, "the clusters are large enough for all experts"
    return clusters


METHOD = Ream()
