"""Gate: the routing weight that a task's tokens give to each expert."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.route.base import RouteScore, TaskLabels


class GateScore(RouteScore):
    """s_ge = mean over the sequences of task g of (1 / L) * sum over the L tokens of a sequence of g_e(x).

    g_e(x) is the routing weight the model used, 0 where e was not chosen (`gate_mass` of the statistic "router").

    Source: the average gate score of ESFT (arXiv 2407.01906, section 3.2).
    """

    name = "gate"
    needs = ("router",)

    def scores(self, statistics: LayerStatistics, target: ExpertTarget, labels: TaskLabels) -> Float[Tensor, "G E"]:
        mass_SE = read_quantity(statistics, target, "router", "gate_mass", expert_dim=1)
        tokens_S = statistics["router"]["tokens"].cpu().clamp(min=1)
        return labels.mean(mass_SE / tokens_S[:, None])


SCORE = GateScore()
