"""EAN: drop the experts with the smallest sum of output norms. A baseline."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.prune.base import ScorePrune


class EanPrune(ScorePrune):
    """Score EAN_e = sum over the tokens routed to e of ||f_e(x)||_2 (`norm` of the statistic "ean", tasks pooled).

    Source: Jaiswal et al. (arXiv 2504.05586); a baseline in REAP (arXiv 2510.13999).
    """

    name = "ean"
    needs = ("ean",)

    def scores(self, statistics: LayerStatistics, target: ExpertTarget) -> Float[Tensor, "E"]:
        return read_quantity(statistics, target, "ean", "norm")


METHOD = EanPrune()
