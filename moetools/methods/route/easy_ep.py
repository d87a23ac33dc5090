"""EASY-EP on one task's tokens: routed output, counted where the block turns the hidden state."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.route.base import RouteScore, TaskLabels


class EasyEpScore(RouteScore):
    """s_ge = sum over the tokens of task g routed to e of g_e(x) * ||f_e(x)||_2 * max(1 - cos(x, x + y(x)), 0).

    The statistic "easy_ep" says what x and y are.

    Source: EASY-EP (arXiv 2504.06792).
    """

    name = "easy-ep"
    needs = ("easy_ep",)
    guarded = True

    def scores(self, statistics: LayerStatistics, target: ExpertTarget, labels: TaskLabels) -> Float[Tensor, "G E"]:
        return labels.sum(read_quantity(statistics, target, "easy_ep", "score_per_task", expert_dim=1))


SCORE = EasyEpScore()
