"""RTN: round to nearest, with scales of least squared error."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from moetools.grids.base import Grid
from moetools.methods.quantize.base import Inputs, QuantizeMethod, Solved, importance_of


@dataclass(frozen=True, kw_only=True)
class Rtn(QuantizeMethod):
    """q_i = nearest value to w_i; scales minimise sum_i h_i (w_i - q_i)^2 per group, h = diag(H) (ones without H).

    Needs no calibration data; with it, columns that carry much of the output count more in the choice of the scales.
    """

    name: ClassVar[str] = "rtn"

    def solve(self, weight_BOI: Float[Tensor, "B O I"], grid: Grid, inputs: Inputs | None) -> Solved:
        importance_BI = importance_of(inputs)
        if inputs is not None and grid.prices_codes:
            importance_BI = self.step_importance(inputs)
        return Solved(quantized=grid.quantize(weight_BOI, importance_BI))


METHOD = Rtn()
