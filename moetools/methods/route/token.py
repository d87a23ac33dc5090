"""Token: how often a task's tokens choose each expert, every sequence counting the same."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.route.base import RouteScore, TaskLabels


class TokenScore(RouteScore):
    """s_ge = mean over the sequences of task g of (1 / L) * sum over the L tokens of a sequence of [e chosen] / K.

    Differs from the score "frequency" where sequences differ in length: there every token counts the same.

    Source: the token selection ratio of ESFT (arXiv 2407.01906, section 3.2).
    """

    name = "token"
    needs = ("load",)

    def scores(self, statistics: LayerStatistics, target: ExpertTarget, labels: TaskLabels) -> Float[Tensor, "G E"]:
        slots_SE = read_quantity(statistics, target, "load", "slots", expert_dim=1)
        return labels.mean(slots_SE / slots_SE.sum(1, keepdim=True).clamp(min=1))


SCORE = TokenScore()
