"""Integers with a scale per row or per group of columns: int2 to int8, and ternary."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.errors import UserError
from moetools.grids._search import ScaleZero, Search, grouped, grouped_importance, in_pieces
from moetools.grids.base import Grid, Params

_SHRINK = {2: 0.2, 3: 0.35, 4: 0.55}
"""Smallest scale tried, as a share of the one that reaches the largest weight, by bits."""
_CANDIDATES = 8
_POLISH = 3


@dataclass(frozen=True, kw_only=True)
class Integer(Grid):
    """value = code * scale, or (code - zero) * scale.

    Symmetric codes are int8 in [-2^(bits-1), 2^(bits-1) - 1]. A scale may be negative: the longer side of the grid then
    lies among the positive values, which at two bits is as good as a zero point. Asymmetric codes are uint8 in
    [0, 2^bits - 1].

    Attributes:
        bits: 2 to 8.
        ternary: symmetric two-bit codes restricted to -1, 0, 1.
        float_zero: asymmetric only: zeros are not rounded to integers (HQQ); stored like scales.
        scale_dtype: precision to which scales (and float zeros) are rounded.

    Raises:
        UserError: a number of bits that does not exist, or options that contradict each other.
    """

    kind: ClassVar[str] = "integer"

    bits: int
    symmetric: bool = True
    ternary: bool = False
    float_zero: bool = False
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"integers of {self.bits} bits do not exist; legal: 2 to 8")
        if self.ternary and (self.bits != 2 or not self.symmetric):
            raise UserError("ternary codes are symmetric two-bit codes", hint="bits=2, symmetric=True")
        if self.float_zero and self.symmetric:
            raise UserError("a symmetric grid has no zeros to store as floats", hint="symmetric=False")

    @property
    def lowest(self) -> int:
        """Smallest code."""
        if self.ternary:
            return -1
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """Largest code."""
        if self.ternary:
            return 1
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def fit(self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None) -> Params:
        """Scales (and zeros) of least importance-weighted squared error: a search over ranges, then least squares.

        Tries 8 ranges from a share of the group's own to a little more than all of it (symmetric: with the extreme
        weight at either end of the grid), then alternates rounding and the closed-form scale (and zero), keeping a step
        only where it lowers the error.

        Raises:
            UserError: groups do not divide the columns.
        """
        self.check_columns(weight_BOI.shape[2], "weight")
        return in_pieces(self._fit_rows, weight_BOI.float(), importance_BI)

    def encode(self, weight_BOC: Float[Tensor, "B O C"], params_BOC: Params) -> Tensor:
        code = self.rounded(weight_BOC.float(), params_BOC.scale_BOG, params_BOC.zero_BOG)
        return code.to(torch.int8 if self.symmetric else torch.uint8)

    def decode(self, codes_BOC: Tensor, params_BOC: Params) -> Float[Tensor, "B O C"]:
        return _value(codes_BOC.to(torch.float32, copy=True), params_BOC.scale_BOG, params_BOC.zero_BOG)

    def rounded(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes as fp32, for tensors of any shapes that go together."""
        code = weight / scale
        return (code if zero is None else code.add_(zero)).round_().clamp_(self.lowest, self.highest)

    def nearest_params(self, wanted: Params, current: Params, group: int | None = None) -> Params:  # noqa: ARG002
        scale = self._storable_scale(wanted.scale_BOG)
        if wanted.zero_BOG is None:
            return Params(scale_BOG=scale)
        return Params(scale_BOG=scale, zero_BOG=self._storable_zero(wanted.zero_BOG))

    def storage_bits(self, rows: int, columns: int) -> float | int:
        """Codes in 32-bit words row by row, one scale per row and group, integer zeros in `bits` each."""
        scale_bits = 32 if self.scale_dtype == "float32" else 16
        zero_bits = 0 if self.symmetric else scale_bits if self.float_zero else self.bits
        groups = math.ceil(columns / (self.group_size or columns))
        return rows * (32 * math.ceil(columns * self.bits / 32) + groups * (scale_bits + zero_bits))

    def _fit_rows(self, weight_BOI: Tensor, importance_BI: Tensor | None) -> Params:
        groups = grouped(weight_BOI, self.group_size)
        importance = grouped_importance(importance_BI, weight_BOI, self.group_size)
        search = Search(groups, importance, lambda group, *params: _value(self.rounded(group, *params), *params))
        for candidate in self._candidates(groups):
            search.offer(*candidate)
        for _ in range(_POLISH):
            search.offer(*self._least_squares(groups, importance, *search.best))
        scale, zero = search.best
        return Params(scale_BOG=scale[..., 0], zero_BOG=None if zero is None else zero[..., 0])

    def _candidates(self, groups_BOGS: Float[Tensor, "B O G S"]) -> Iterator[ScaleZero]:
        low, high = groups_BOGS.amin(-1, keepdim=True), groups_BOGS.amax(-1, keepdim=True)
        shares = torch.linspace(_SHRINK.get(self.bits, 0.8), 1.05, _CANDIDATES).tolist()
        if not self.symmetric:
            if not self.float_zero:
                low, high = low.clamp(max=0), high.clamp(min=0)
            for share in shares:
                scale = self._storable_scale((high - low) * share / self.highest)
                yield scale, self._storable_zero(-low * share / scale)
            return
        extreme = torch.where(high > -low, high, low)
        for share in shares:
            yield self._storable_scale(extreme * (share / self.lowest)), None
            if not self.ternary and self.bits <= 4:
                yield self._storable_scale(extreme * (share / self.highest)), None

    def _least_squares(self, groups: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None) -> ScaleZero:
        """The scales (and zeros) that fit best the codes which the given ones lead to, rounded."""
        code = self.rounded(groups, scale, zero)
        if zero is None:
            best = _ratio((importance * groups * code).sum(-1, True), (importance * code**2).sum(-1, True))
            return self._storable_scale(torch.where(best == 0, scale, best)), None
        total = importance.sum(-1, keepdim=True)
        mean_code = (importance * code).sum(-1, keepdim=True) / total
        mean = (importance * groups).sum(-1, keepdim=True) / total
        code -= mean_code
        slope = _ratio((importance * code * groups).sum(-1, True), (importance * code**2).sum(-1, True))
        slope = self._storable_scale(torch.where(slope == 0, scale, slope))
        return slope, self._storable_zero(mean_code - mean / slope)

    def _storable_scale(self, scale: Tensor) -> Tensor:
        dtype = getattr(torch, self.scale_dtype)
        limits = torch.finfo(dtype)
        magnitude = torch.where(scale == 0, 1.0, scale.abs().clamp(limits.tiny, limits.max))
        return torch.where(scale < 0, -magnitude, magnitude).to(dtype).float()

    def _storable_zero(self, zero: Tensor) -> Tensor:
        if not self.float_zero:
            return zero.round().clamp(0, self.highest)
        dtype = getattr(torch, self.scale_dtype)
        limits = torch.finfo(dtype)
        return zero.clamp(limits.min, limits.max).to(dtype).float()


def _value(code: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Overwrites `code`."""
    return (code if zero is None else code.sub_(zero)).mul_(scale)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero where the denominator is."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


GRID = Integer
