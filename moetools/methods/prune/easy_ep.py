"""EASY-EP: drop the experts with the least routed output on the tokens that the block turns."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.prune.base import ScorePrune


class EasyEpPrune(ScorePrune):
    """Score S_e = sum over the tokens routed to e of g_e(x) * ||f_e(x)||_2 * max(1 - cos(x, x + y(x)), 0).

    `score` of the statistic "easy_ep" (which says what x and y are), tasks pooled. Meant for one domain's data: a sum,
    so an expert that the domain rarely uses scores low however strong it is.

    Source: EASY-EP (arXiv 2504.06792).
    """

    name = "easy-ep"
    needs = ("easy_ep",)

    def scores(self, statistics: LayerStatistics, target: ExpertTarget) -> Float[Tensor, "E"]:
        return read_quantity(statistics, target, "easy_ep", "score")


METHOD = EasyEpPrune()
