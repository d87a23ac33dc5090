"""Frequency: the share of a task's slots that went to each expert."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.route.base import RouteScore, TaskLabels


class FrequencyScore(RouteScore):
    """s_ge = n_ge / sum_e n_ge, n_ge the (token, rank) pairs of task g that chose expert e."""

    name = "frequency"
    needs = ("load",)

    def scores(self, statistics: LayerStatistics, target: ExpertTarget, labels: TaskLabels) -> Float[Tensor, "G E"]:
        slots_GE = labels.sum(read_quantity(statistics, target, "load", "slots", expert_dim=1))
        return slots_GE / slots_GE.sum(1, keepdim=True).clamp(min=1)


SCORE = FrequencyScore()
