"""Sub-MoE: merge experts inside a subspace that all members of a cluster share."""

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.methods.base import FEW_TOKENS, ExpertDecision, ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.merge.base import ClusterMerge, by_importance, slots_of
from moetools.methods.subspace import combine_in_subspace

_ROUNDS = 50


class SubMoe(ClusterMerge):
    """Clusters of like mean outputs (spherical k-means); members averaged in their truncated common column space.

    Feature m_e / ||m_e||, m_e = mean of f_e(x) over the tokens routed to e (statistic "mean_output"). Centres start at
    the `keep / num_groups` most used experts of a router group; every expert joins the centre of highest cosine,
    centres move to the mean of their members, until nothing changes. A centre that loses all experts takes back the
    one it started from.

    Merged projection (`moetools.methods.subspace`): with [W_1 | ... | W_n] = U S [V_1 | ... | V_n]^T and frequencies b,
    U_r S_r (sum_j b_j V_j,r)^T: a plain matrix of the old shape, so the result is a stock checkpoint. r is `rank` of
    the largest possible rank.

    The paper initialises k-means at random.

    Source: Sub-MoE (arXiv 2506.23266).
    """

    name = "sub-moe"
    needs = ("load", "mean_output")
    min_tokens = FEW_TOKENS
    weighting = "frequency"
    combine = "subspace"
    rank = 0.75

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        mean_ED = read_quantity(statistics, target, "mean_output", "mean")[torch.tensor(members)]
        slots = slots_of(statistics, target)
        seeds = [members.index(expert) for expert in by_importance(members, slots)[: target.keep_per_group]]
        label = spherical_kmeans(mean_ED, seeds)
        return [[members[place] for place, own in enumerate(label) if own == centre] for centre in range(len(seeds))]

    def apply(self, weights: LayerWeights, decision: ExpertDecision) -> LayerWeights:
        return combine_in_subspace(weights, decision, self.rank)


def spherical_kmeans(points_ED: Float[Tensor, "E D"], seeds: list[int]) -> list[int]:
    """Cluster of every point: Lloyd's algorithm by cosine, started at the points `seeds`; no cluster is empty.

    Zero points have cosine 0 with everything. Ties go to the earlier centre.
    """
    unit_ED = torch.nn.functional.normalize(points_ED, dim=1)
    centre_CD = unit_ED[seeds]
    label: list[int] = []
    for _ in range(_ROUNDS):
        # Rounding keeps copies of one point together whatever the order of summation.
        found = (unit_ED @ centre_CD.T).round(decimals=12).argmax(1).tolist()
        # Taking a seed back may empty the cluster it was in, which then takes back its own.
        while missing := sorted(set(range(len(seeds))) - set(found)):
            found[seeds[missing[0]]] = missing[0]
        if found == label:
            break
        label = found
        sums_CD = torch.zeros_like(centre_CD).index_add_(0, torch.tensor(label), unit_ED)
        centre_CD = torch.nn.functional.normalize(sums_CD, dim=1)
    return label


METHOD = SubMoe()
