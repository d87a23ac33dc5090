"""M-SMoE: every expert joins the dominant expert that the router treats most like it."""

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.merge.base import ClusterMerge, join_dominant, slots_of


class MSmoe(ClusterMerge):
    """Dominant experts by frequency, all others merged into the most similar of them with frequency weights.

    The `keep / num_groups` most used experts of each router group are dominant (slots n_e of the statistic "load",
    ties by index). Every other expert e joins argmax over dominant d of r_ed, the correlation of their router logits
    over the calibration tokens (`similarity` of the statistic "router_similarity"; ties go to the more used). Merged
    expert: sum of n_e W_e / sum of n_e over the cluster, neurons aligned to the dominant expert's first. The router
    row is the same mean.

    The paper spreads the dominant experts unevenly over the layers; here every layer keeps the number it is told to,
    because only equal counts load in stock transformers.

    Source: MC-SMoE (arXiv 2310.01334, section 3.1).
    """

    name = "m-smoe"
    needs = ("load", "router_similarity")
    weighting = "frequency"
    align = True

    def partition(self, statistics: LayerStatistics, target: ExpertTarget, members: list[int]) -> list[list[int]]:
        similarity_EE = read_quantity(statistics, target, "router_similarity", "similarity")
        return join_dominant(members, slots_of(statistics, target), similarity_EE, target.keep_per_group)


METHOD = MSmoe()
