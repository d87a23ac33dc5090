"""AWQ: columns that carry much of the input are enlarged before rounding, where the factor can be folded away."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.grids.base import Grid
from moetools.methods.quantize.base import Inputs, QuantizeMethod, Solved, energy, importance_of


@dataclass(frozen=True, kw_only=True)
class Awq(QuantizeMethod):
    """Rounds W diag(s) to nearest instead of W; the layer before gives x / s instead of x.

    The caller asks `column_scales` for s, multiplies W's columns by it and divides by it what makes x: for a down
    projection the rows of the same expert's up projection, exactly. Where x has other readers (the router and the
    shared experts read what gate and up read) nothing can be folded, and this is `rtn` with inputs.

    s_j = (E g^2 x_j^2)^(a/2), rounded to powers of two so that folding is exact in any float format; a is the one of
    `exponents` with the least tr((W - Q) H (W - Q)^T). Source: AWQ, arXiv 2306.00978, section 3.2 (there with the mean
    of |x_j| and s in full precision).

    Attributes:
        exponents: candidates for a, tried per matrix; 0 is no scaling.
    """

    name: ClassVar[str] = "awq"
    needs_inputs: ClassVar[bool] = True
    scales_columns: ClassVar[bool] = True

    exponents: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def column_scales(self, weight_BOI: Float[Tensor, "B O I"], grid: Grid, inputs: Inputs) -> Float[Tensor, "B I"]:
        weight = weight_BOI.float()
        size_BI = inputs.hessian_BII.diagonal(dim1=1, dim2=2).float()
        best_BI = torch.ones_like(size_BI)
        least_B: Tensor | None = None
        for exponent in self.exponents:
            scale_BI = _powers_of_two(size_BI, exponent / 2)
            scaled = scaled_inputs(inputs, scale_BI)
            scaled_BOI = weight * scale_BI[:, None, :]
            value_BOI = grid.quantize(scaled_BOI, importance_of(scaled)).dequantize()
            lost_B = energy(scaled_BOI - value_BOI, scaled.hessian_BII)
            better_B = torch.ones_like(lost_B, dtype=torch.bool) if least_B is None else lost_B < least_B
            least_B = lost_B if least_B is None else torch.where(better_B, lost_B, least_B)
            best_BI = torch.where(better_B[:, None], scale_BI, best_BI)
        return best_BI

    def solve(self, weight_BOI: Float[Tensor, "B O I"], grid: Grid, inputs: Inputs | None) -> Solved:
        return Solved(quantized=grid.quantize(weight_BOI, importance_of(inputs)))


def scaled_inputs(inputs: Inputs, scale_BI: Float[Tensor, "B I"]) -> Inputs:
    """The inputs of W diag(s), which are x / s."""
    both = scale_BI[:, :, None] * scale_BI[:, None, :]
    return Inputs(hessian_BII=inputs.hessian_BII / both, count_B=inputs.count_B)


def _powers_of_two(size_BI: Tensor, exponent: float) -> Tensor:
    """size^exponent over its geometric middle, rounded to a power of two; 1 for columns without inputs."""
    logarithm = torch.where(size_BI > 0, size_BI, torch.nan).log2()
    middle = logarithm.nanmedian(1, keepdim=True).values
    return torch.exp2(((logarithm - middle) * exponent).round().nan_to_num(0.0))


METHOD = Awq()
