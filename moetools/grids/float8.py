"""Eight-bit floats E4M3 with one scale per row (or per group of columns)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.grids._e4m3 import LARGEST, OCTAVE_STEPS, round_e4m3
from moetools.grids._search import Search, grouped, grouped_importance, in_pieces, positive_storable
from moetools.grids.base import Grid, Params


@dataclass(frozen=True, kw_only=True)
class Float8(Grid):
    """value = e4m3 * scale; codes are the bits of `torch.float8_e4m3fn` as uint8. NaN codes are never written.

    Attributes:
        scale_dtype: precision to which scales are rounded.
    """

    kind: ClassVar[str] = "float8"

    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def fit(self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None) -> Params:
        """The best of 8 scales, from the one that takes the largest weight to 448 up to twice that.
        Raises:
            UserError: groups do not divide the columns.
        """
        self.check_columns(weight_BOI.shape[2], "weight")
        return in_pieces(self._fit_rows, weight_BOI.float(), importance_BI)

    def _fit_rows(self, weight_BOI: Tensor, importance_BI: Tensor | None) -> Params:
        groups = grouped(weight_BOI, self.group_size)
        importance = grouped_importance(importance_BI, weight_BOI, self.group_size)
        search = Search(groups, importance, lambda group, scale, _: round_e4m3(group / scale).float() * scale)
        largest = groups.abs().amax(-1, keepdim=True)
        for octave in range(OCTAVE_STEPS):
            search.offer(self._storable(largest / LARGEST * 2 ** (octave / OCTAVE_STEPS)))
        return Params(scale_BOG=search.best[0][..., 0])

    def encode(self, weight_BOC: Float[Tensor, "B O C"], params_BOC: Params) -> Tensor:
        return round_e4m3(weight_BOC.float() / params_BOC.scale_BOG).view(torch.uint8)

    def decode(self, codes_BOC: Tensor, params_BOC: Params) -> Float[Tensor, "B O C"]:
        return codes_BOC.view(torch.float8_e4m3fn).float() * params_BOC.scale_BOG

    def nearest_params(self, wanted: Params, current: Params, group: int | None = None) -> Params:  # noqa: ARG002
        return Params(scale_BOG=self._storable(wanted.scale_BOG))

    def storage_bits(self, rows: int, columns: int) -> float | int:
        scale_bits = 32 if self.scale_dtype == "float32" else 16
        return rows * (8 * columns + scale_bits * math.ceil(columns / (self.group_size or columns)))

    def _storable(self, scale: Tensor) -> Tensor:
        return positive_storable(scale, getattr(torch, self.scale_dtype))


GRID = Float8
