"""HQQ: zeros (or scales) that make the rounding error sparse; needs no calibration data."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.errors import UserError
from moetools.grids.base import Grid, Params, Quantized
from moetools.methods.quantize.base import Inputs, QuantizeMethod, Solved


@dataclass(frozen=True, kw_only=True)
class Hqq(QuantizeMethod):
    """min sum |w - q|^p over zeros, p < 1, by half-quadratic splitting; inputs play no part.

    In units of the scale s, with codes c = round(w / s + z) and error r = w / s - (c - z), alternate
      e = sign(r) max(0, |r| - |r|^(p-1) / beta)      (the errors that are left alone: outliers)
      z = mean over the group of (c - (w / s - e))
    while beta grows, until sum |w - q|^p of a group no longer falls. On grids without zeros the scale is solved
    for in the same way, s = <c, w - s e> / <c, c>, so that the result loads in stock libraries.

    Source: Half-Quadratic Quantization (Badri and Shaji, 2023, mobiusml.github.io/hqq_blog). There beta applies to the
    weights' own units; here to steps, so that the result does not depend on the weights' scale.

    Attributes:
        power: p.
        beta, growth: beta and its factor per iteration.
        iterations: how often the steps are done.
    """

    name: ClassVar[str] = "hqq"

    power: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20

    def solve(self, weight_BOI: Float[Tensor, "B O I"], grid: Grid, inputs: Inputs | None) -> Solved:  # noqa: ARG002
        params = grid.fit(weight_BOI)
        if grid.nearest_params(params, params) is None or params.unit_BOS is not None:
            raise UserError(
                f"hqq cannot fit the scales of the grid '{grid.kind}', which rows share, or groups",
                hint="`method=rtn` or `method=gptq`",
            )
        group_I = grid.group_of_column(weight_BOI.shape[2], weight_BOI.device)
        best, least_BOG = params, torch.full_like(params.scale_BOG, torch.inf)
        going_BOG = torch.ones_like(params.scale_BOG, dtype=torch.bool)
        for iteration in range(self.iterations):
            codes_BOI = grid.encode(weight_BOI, params.columns(group_I))
            error_BOI = weight_BOI - grid.decode(codes_BOI, params.columns(group_I))
            lost_BOG = _by_group(error_BOI.abs() ** self.power, grid).sum(-1)
            going_BOG &= lost_BOG < least_BOG
            if not going_BOG.any():
                break
            least_BOG = torch.where(going_BOG, lost_BOG, least_BOG)
            best = _choose(going_BOG, params, best)
            scale_BOI = params.columns(group_I).scale_BOG
            left_BOI = scale_BOI * _shrink(error_BOI / scale_BOI, self.beta * self.growth**iteration, self.power)
            params = _choose(going_BOG, _solved(grid, codes_BOI, weight_BOI - left_BOI, params), best)
        codes_BOI = grid.encode(weight_BOI, best.columns(group_I))
        return Solved(quantized=Quantized(grid=grid, codes_BOI=codes_BOI, params=best))


def _shrink(error: Tensor, beta: float, power: float) -> Tensor:
    """The proximal step of |.|^p: small errors become zero, large ones stay nearly as they are."""
    magnitude = error.abs()
    return error.sign() * (magnitude - magnitude.clamp(min=1e-8) ** (power - 1) / beta).clamp(min=0)


def _by_group(tensor_BOI: Tensor, grid: Grid) -> Tensor:
    return tensor_BOI.unflatten(2, (-1, grid.group_size or tensor_BOI.shape[2]))


def _solved(grid: Grid, codes_BOI: Tensor, wanted_BOI: Tensor, params: Params) -> Params:
    """Zeros, or scales where there are none, of least squared distance to `wanted_BOI`, storable."""
    scale_BOG = params.scale_BOG
    one = Params(
        scale_BOG=torch.ones_like(codes_BOI, dtype=torch.float32),
        zero_BOG=None if params.zero_BOG is None else torch.zeros_like(codes_BOI, dtype=torch.float32),
    )
    units = _by_group(grid.decode(codes_BOI, one), grid)
    wanted = _by_group(wanted_BOI, grid)
    if params.zero_BOG is None:
        square = (units * units).sum(-1)
        solved = torch.where(square > 0, (units * wanted).sum(-1) / square.clamp(min=1e-30), scale_BOG)
        new = replace(params, scale_BOG=solved)
    else:
        new = replace(params, zero_BOG=(units - wanted / scale_BOG[..., None]).mean(-1))
    stored = grid.nearest_params(new, params)
    assert stored is not None
    return stored


def _choose(first_BOG: Tensor, yes: Params, no: Params) -> Params:
    zero_BOG = None
    if yes.zero_BOG is not None and no.zero_BOG is not None:
        zero_BOG = torch.where(first_BOG, yes.zero_BOG, no.zero_BOG)
    return Params(scale_BOG=torch.where(first_BOG, yes.scale_BOG, no.scale_BOG), zero_BOG=zero_BOG)


METHOD = Hqq()
