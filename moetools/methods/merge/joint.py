"""Joint least squares: experts grouped by router similarity; neurons and down projections chosen for the output."""

import torch
from torch import Tensor

from moetools.methods.base import FEW_TOKENS, ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.merge.base import ClusterMerge


class Joint(ClusterMerge):
    """Centroids are the most salient experts (REAP); every other expert joins the one its router row agrees with most.

    What follows the grouping makes the method (`moetools.passes.layer_reduction`): the router rows are fitted to
    the cluster's logsumexp, the neurons of a new expert are chosen among all its members' by the loss in the layer's
    output (Optimal Brain Surgeon), and all down projections are solved together towards the original's hidden states,
    layer after layer. Source: moetools; docs/benchmarks.md has the measurements.
    """

    name = "joint"
    needs = ("load", "reap", "router_similarity")
    min_tokens = FEW_TOKENS
    weighting = "saliency"
    combine = "neurons"
    router = "fitted"
    refit = "joint"
    sequential = True

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        saliency = read_quantity(statistics, target, "reap", "saliency")[members]
        similarity = read_quantity(statistics, target, "router_similarity", "similarity")
        order = torch.argsort(saliency, descending=True, stable=True).tolist()
        centroids = sorted(members[place] for place in order[: target.keep_per_group])
        clusters = {centroid: [centroid] for centroid in centroids}
        for expert in members:
            if expert not in clusters:
                clusters[centroids[int(_among(similarity[expert], centroids).argmax())]].append(expert)
        return list(clusters.values())


def _among(row: Tensor, experts: list[int]) -> Tensor:
    return row[torch.tensor(experts)]


METHOD = Joint()
