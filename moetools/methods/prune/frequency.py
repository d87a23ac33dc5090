"""Frequency: drop the experts that are chosen least often. A baseline."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.prune.base import ScorePrune


class FrequencyPrune(ScorePrune):
    """Score n_e / (T * K) = the share of all slots that went to expert e (statistic "load", tasks pooled).

    Source: the baseline of REAP (arXiv 2510.13999).
    """

    name = "frequency"
    needs = ("load",)

    def scores(self, statistics: LayerStatistics, target: ExpertTarget) -> Float[Tensor, "E"]:
        slots_E = read_quantity(statistics, target, "load", "slots", expert_dim=1).sum(0)
        return slots_E / slots_E.sum().clamp(min=1)


METHOD = FrequencyPrune()
