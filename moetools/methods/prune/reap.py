"""REAP: drop the experts with the least router-weighted output."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import FEW_TOKENS, ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.prune.base import ScorePrune


class ReapPrune(ScorePrune):
    """Score S_e = mean over the tokens routed to e of g_e(x) * ||f_e(x)||_2 (`saliency` of the statistic "reap").

    Tasks are pooled by tokens. An expert that calibration never reached scores 0 and goes first. Super experts
    (`super_experts`, found in the statistic "max_activation" of all layers) are kept before all others where statistics
    of the whole original are at hand, that is in a run that is not sequential.

    Source: REAP (arXiv 2510.13999).
    """

    name = "reap"
    needs = ("reap",)
    min_tokens = FEW_TOKENS
    guarded = True

    def scores(self, statistics: LayerStatistics, target: ExpertTarget) -> Float[Tensor, "E"]:
        return read_quantity(statistics, target, "reap", "saliency")


METHOD = ReapPrune()
