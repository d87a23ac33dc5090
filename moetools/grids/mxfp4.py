"""MXFP4: four-bit floats E2M1 in groups of 32, scales that are powers of two."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.grids._e2m1 import LARGEST, decode_e2m1, encode_e2m1
from moetools.grids._search import Search, grouped, grouped_importance, in_pieces
from moetools.grids.base import Grid, Params

_LIMIT = 126


@dataclass(frozen=True, kw_only=True)
class MxFp4(Grid):
    """value = e2m1 * 2^n, n in -126 .. 126 (stored as E8M0: n + 127). Codes are uint8, 0..15.

    Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.2 and 5.4.1.
    """

    kind: ClassVar[str] = "mxfp4"
    fixed_blocks: ClassVar[bool] = True

    group_size: int | None = 32

    def fit(self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None) -> Params:
        """The best of the four powers of two around the one that just takes the largest weight to 6.

        Raises:
            UserError: groups do not divide the columns.
        """
        self.check_columns(weight_BOI.shape[2], "weight")
        return in_pieces(self._fit_rows, weight_BOI.float(), importance_BI)

    def _fit_rows(self, weight_BOI: Tensor, importance_BI: Tensor | None) -> Params:
        groups = grouped(weight_BOI, self.group_size)
        importance = grouped_importance(importance_BI, weight_BOI, self.group_size)
        search = Search(groups, importance, lambda group, scale, _: decode_e2m1(encode_e2m1(group / scale)) * scale)
        largest = groups.abs().amax(-1, keepdim=True)
        exponent = torch.where(largest > 0, torch.frexp(largest / LARGEST).exponent, 0)
        for offset in (0, -1, -2, 1):
            search.offer(_power_of_two(exponent + offset))
        return Params(scale_BOG=search.best[0][..., 0])

    def encode(self, weight_BOC: Float[Tensor, "B O C"], params_BOC: Params) -> Tensor:
        return encode_e2m1(weight_BOC.float() / params_BOC.scale_BOG)

    def decode(self, codes_BOC: Tensor, params_BOC: Params) -> Float[Tensor, "B O C"]:
        return decode_e2m1(codes_BOC) * params_BOC.scale_BOG

    def nearest_params(self, wanted: Params, current: Params, group: int | None = None) -> Params:  # noqa: ARG002
        mantissa, exponent = torch.frexp(wanted.scale_BOG.clamp(min=2.0**-_LIMIT))
        return Params(scale_BOG=_power_of_two(exponent - (mantissa < 0.75).int()))

    def storage_bits(self, rows: int, columns: int) -> float | int:
        return rows * (4 * columns + 8 * math.ceil(columns / (self.group_size or columns)))


def _power_of_two(exponent: Tensor) -> Tensor:
    limited = exponent.clamp(-_LIMIT, _LIMIT).float()
    return torch.exp2(limited)


GRID = MxFp4
