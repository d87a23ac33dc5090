"""Output: all that an expert adds to a task's tokens."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.route.base import RouteScore, TaskLabels


class OutputScore(RouteScore):
    """s_ge = sum over the tokens of task g routed to e of g_e(x) * ||f_e(x)||_2: REAP's saliency times the load.

    Where few experts stay, how many tokens lose their expert matters as much as what each of them loses.
    """

    name = "output"
    needs = ("reap",)
    guarded = True

    def scores(self, statistics: LayerStatistics, target: ExpertTarget, labels: TaskLabels) -> Float[Tensor, "G E"]:
        return labels.sum(read_quantity(statistics, target, "reap", "weighted_norm", expert_dim=1))


SCORE = OutputScore()
