"""MergeMoE: average what experts compute inside, then refit the down projection to their averaged outputs."""

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.merge.base import ClusterMerge, join_dominant, slots_of


class MergeMoe(ClusterMerge):
    """Frequency-weighted mean of gate and up, and a down projection refitted to the members' mean output.

    With b_j = n_j / sum of n over the cluster (n_j slots of expert j, statistic "load"), q_j(x) the intermediate of
    member j and p(x) that of the expert with the averaged gate and up projections:

        W_D' = argmin over W of sum over x of ||sum_j b_j W_Dj q_j(x) - W p(x)||^2 + lambda ||W - sum_j b_j W_Dj||^2

    over the tokens x that the new router sends to the cluster, lambda chosen on held-out sequences (`--refit members`,
    `moetools.passes.sequential`). Sums of p p^T and of targets times p^T are streamed; no sample is kept.

    Two differences from the paper: it takes the pseudo-inverse over stored samples, which collapses with few of them,
    where ours shrinks to the plain mean; and clusters form around the most used experts by router similarity, as
    M-SMoE's do.

    Source: MergeMoE (arXiv 2510.14436).
    """

    name = "mergemoe"
    needs = ("load", "router_similarity")
    weighting = "frequency"
    refit = "members"

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        similarity_EE = read_quantity(statistics, target, "router_similarity", "similarity")
        return join_dominant(members, slots_of(statistics, target), similarity_EE, target.keep_per_group)


METHOD = MergeMoe()
