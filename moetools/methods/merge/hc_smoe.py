"""HC-SMoE: merge experts whose mean outputs lie close together."""

import torch
from sklearn.cluster import AgglomerativeClustering

from moetools.methods.base import FEW_TOKENS, ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.merge.base import ClusterMerge


class HcSmoe(ClusterMerge):
    """Average-linkage agglomerative clustering of mean expert outputs, then a frequency-weighted mean.

    Feature m_e = mean of f_e(x) over the tokens routed to e [D] (statistic "mean_output"; zeros if e was never routed).
    Start with one cluster per expert; join the two clusters A, B with the least mean distance
    1 / (|A||B|) * sum over a in A, b in B of ||m_a - m_b||_2, until `keep / num_groups` are left in each router group.
    Merged expert: sum over e in the cluster of n_e W_e / sum of n_e, with n_e the slots of e (statistic "load"); the
    plain mean if no member was ever used.

    Two differences from the authors' code: their feature averages over all calibration tokens, ours over the tokens
    routed to the expert, because experts run on no others; and their router keeps E rows that share experts, while ours
    shrinks to the kept number, so that the checkpoint does too.

    Source: HC-SMoE (arXiv 2410.08589, section 3).
    """

    name = "hc-smoe"
    needs = ("load", "mean_output")
    min_tokens = FEW_TOKENS
    weighting = "frequency"

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        mean_ED = read_quantity(statistics, target, "mean_output", "mean")
        if target.keep_per_group == len(members):
            return [[expert] for expert in members]
        clustering = AgglomerativeClustering(n_clusters=target.keep_per_group, metric="euclidean", linkage="average")
        labels = clustering.fit_predict(mean_ED[torch.tensor(members)].numpy())
        return [
            [expert for expert, label in zip(members, labels, strict=True) if label == cluster]
            for cluster in range(target.keep_per_group)
        ]


METHOD = HcSmoe()
