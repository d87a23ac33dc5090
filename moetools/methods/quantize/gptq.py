"""GPTQ with searched scales, followed by descent over codes and scales."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.grids.base import Grid, Params, Quantized
from moetools.methods.quantize._refine import refine, row_errors, select_rows
from moetools.methods.quantize._solver import (
    Factor,
    activation_order,
    compensated_codes,
    damped,
    factorize,
    permuted,
    regular,
)
from moetools.methods.quantize.base import Inputs, QuantizeMethod, Solved, over_slots


@dataclass(frozen=True, kw_only=True)
class Gptq(QuantizeMethod):
    """Minimises tr((W - Q) H (W - Q)^T) over codes and scales, H = mean of g^2 x x^T, for all B matrices at once.

    1. Scales by a search in each group, columns weighted by diag(H).
    2. GPTQ (arXiv 2210.17323): columns in the order of diag(H), groups and scales staying in place; each rounding error
       is made up for by the columns not yet rounded. H is damped; see `_solver.factorize`.
    3. Descent over scales and codes (`_refine.refine`), which never raises the error in the damped H.
    4. With `rounds` above 1, steps 2 and 3 again from the scales found, keeping each row's better result.

    Attributes:
        damping: added to the diagonal of H, as a share of its mean.
        activation_order: round columns by falling diag(H); else from left to right.
        rounds: how often steps 2 and 3 are done; a second time costs a third of a run and lowers KL by 4 to 6 %.
        sweeps: most rounds of descent in step 3; 0 is plain GPTQ.
        block_size: columns that are updated together; no effect on the result.
    """

    name: ClassVar[str] = "gptq"
    needs_inputs: ClassVar[bool] = True

    damping: float = 0.02
    activation_order: bool = True
    rounds: int = 1
    sweeps: int = 4
    block_size: int = 32

    def solve(self, weight_BOI: Float[Tensor, "B O I"], grid: Grid, inputs: Inputs | None) -> Solved:
        assert inputs is not None
        hessian_BII = regular(inputs.hessian_BII)
        order_BI, factor = self._factor(hessian_BII)
        damped_BII = damped(hessian_BII, torch.tensor(factor.damping, device=weight_BOI.device))

        def once(params: Params) -> Quantized:
            codes_BOI = compensated_codes(weight_BOI, grid, params, factor.upper_BII, order_BI, self.block_size)
            plain = Quantized(grid=grid, codes_BOI=codes_BOI, params=params)
            if grid.prices_codes:
                return plain
            return refine(plain, weight_BOI, damped_BII, self.sweeps, self.block_size)

        importance_BI = hessian_BII.diagonal(dim1=1, dim2=2)
        if grid.prices_codes:
            importance_BI = over_slots(_compensated(order_BI, factor), inputs)
        best = once(grid.fit(weight_BOI, importance_BI))
        refitted = self.sweeps > 0 and grid.nearest_params(best.params, best.params) is not None
        for _ in range(self.rounds - 1 if refitted else 0):
            again = once(best.params)
            better_BO = row_errors(again, weight_BOI, damped_BII) < row_errors(best, weight_BOI, damped_BII)
            best = select_rows(better_BO, again, best)
        return Solved(quantized=best, damping=factor.damping, condition=factor.condition)

    def step_importance(self, inputs: Inputs) -> Float[Tensor, "B I"]:
        return over_slots(_compensated(*self._factor(regular(inputs.hessian_BII))), inputs)

    def _factor(self, hessian_BII: Tensor) -> tuple[Int[Tensor, "B I"], Factor]:
        """The order of columns, and the factor of the damped Hessians in that order."""
        batch, columns, _ = hessian_BII.shape
        order_BI = torch.arange(columns, device=hessian_BII.device).expand(batch, -1)
        if self.activation_order:
            order_BI = activation_order(hessian_BII)
        return order_BI, factorize(permuted(hessian_BII, order_BI), self.damping)

    def scratch_bytes(self, rows: int, columns: int) -> int:
        return 4 * (8 * columns**2 + 12 * rows * columns)


def _compensated(order_BI: Tensor, factor: Factor) -> Float[Tensor, "B I"]:
    """1 / U_ii^2 by original column: what a unit error in a column costs once later columns have made up for it."""
    cost_BI = factor.upper_BII.diagonal(dim1=1, dim2=2).square().reciprocal()
    return torch.empty_like(cost_BI).scatter_(1, order_BI, cost_BI)


METHOD = Gptq()
