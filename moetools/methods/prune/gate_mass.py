"""Gate mass: drop the experts whose routing weights add up to least."""

from jaxtyping import Float
from torch import Tensor

from moetools.methods.base import ExpertTarget, LayerStatistics, read_quantity
from moetools.methods.prune.base import ScorePrune


class GateMassPrune(ScorePrune):
    """Score sum over the tokens routed to e of g_e(x) (`gate_mass` of the statistic "router", tasks pooled).

    g_e(x) is the routing weight the model used. Looks at no expert output, so calibration costs a plain forward pass.

    Source: the gate score of ESFT (arXiv 2407.01906), there an average over tokens, which ranks the same.
    """

    name = "gate-mass"
    needs = ("router",)

    def scores(self, statistics: LayerStatistics, target: ExpertTarget) -> Float[Tensor, "E"]:
        return read_quantity(statistics, target, "router", "gate_mass", expert_dim=1).sum(0)


METHOD = GateMassPrune()
