"""REAM: the most salient experts absorb the experts most similar to them, most of them none."""

import math

from moetools.methods.base import FEW_TOKENS, ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.merge.base import ClusterMerge, by_importance, saliency_of

_SHARE = 8


class Ream(ClusterMerge):
    """Centroids by saliency S_e; in that order each absorbs its nearest free non-centroids, up to C in a cluster.

    S_e is the mean of g_e(x)^2 * ||f_e(x)|| over the tokens routed to e (statistic "ream_saliency"). The k = keep /
    num_groups experts of highest S_e in each router group (of M experts) are the centroids. From the most salient to
    the least, each takes the most similar of the non-centroids that are still free until its cluster has C members or
    none are left: a few large clusters, most centroids stay alone ("pseudo-pruning": the absorbed experts weigh little
    beside their centroid). C = max(2, M / 8, ceil(M / k)), which is the authors' 16 for 128 experts. Similarity of i
    and j: the mean of

        the correlation of their router logits (`similarity` of the statistic "router_similarity"), and
        the cosine of their gated outputs (`cosine` of the statistic "gated_similarity").

    Merged expert: sum of S_e W_e / sum of S_e over the cluster, neurons aligned to the centroid's first. The router
    keeps the centroid's row. Ties go to the lower index.

    Differences from the authors' code: it runs all experts on all tokens and compares their mean gated outputs, ours
    reads the routed ones token by token; it rescales both similarities to [0, 1] and takes the distance of uncentred
    logits for the first; its gate is the softmax over all experts, ours the weight the model used; and its C is 16
    whatever the number of experts, and an error where that could not take up all of them.

    Source: REAM (arXiv 2604.04356).
    """

    name = "ream"
    needs = ("load", "ream_saliency", "router_similarity", "gated_similarity")
    min_tokens = FEW_TOKENS
    weighting = "saliency"
    saliency = "ream_saliency"
    router = "centroid"
    align = True
    sequential = True

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        by_router_EE = read_quantity(statistics, target, "router_similarity", "similarity")
        by_output_EE = read_quantity(statistics, target, "gated_similarity", "cosine")
        similarity = ((by_router_EE + by_output_EE) / 2).tolist()
        ranked = by_importance(members, saliency_of(statistics, target, self.saliency))
        count = target.keep_per_group
        return absorb(ranked[:count], sorted(ranked[count:]), similarity, group_size(len(members), count))


def group_size(experts: int, count: int) -> int:
    """C, the most experts in a cluster."""
    return max(2, experts // _SHARE, math.ceil(experts / count))


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
