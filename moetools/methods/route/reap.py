"""REAP on one task's tokens: the mean router-weighted output norm of each expert."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.route.base import RouteScore, TaskLabels


class ReapScore(RouteScore):
    """s_ge = mean over the tokens of task g routed to e of g_e(x) * ||f_e(x)||_2; 0 without such tokens.

    A mean: an expert that serves few tokens, but strongly, scores high. The score "output" is the sum.

    Source: REAP (arXiv 2510.13999).
    """

    name = "reap"
    needs = ("reap",)
    guarded = True

    def scores(self, statistics: LayerStatistics, target: ExpertTarget, labels: TaskLabels) -> Float[Tensor, "G E"]:
        norm_GE = labels.sum(read_quantity(statistics, target, "reap", "weighted_norm", expert_dim=1))
        slots_GE = labels.sum(read_quantity(statistics, target, "reap", "slots", expert_dim=1))
        return norm_GE / slots_GE.clamp(min=1)


SCORE = ReapScore()
