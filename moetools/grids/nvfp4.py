"""NVFP4: four-bit floats E2M1 in groups of 16, E4M3 scales, one global scale per matrix."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.grids._e2m1 import LARGEST, decode_e2m1, encode_e2m1
from moetools.grids._e4m3 import LARGEST as E4M3_LARGEST
from moetools.grids._search import Search, grouped, grouped_importance
from moetools.grids.base import Grid, Params

_E4M3_MIN = 2.0**-9
_CANDIDATES = 12


@dataclass(frozen=True, kw_only=True)
class NvFp4(Grid):
    """value = e2m1 * scale, scale = e4m3 * 2^k with one k per matrix. Codes are uint8, 0..15.

    The global scale 2^k is a power of two, so `scale_BOG` is exact in fp32 and `split_scale` finds both factors again.
    E4M3 spans 17 octaves, so nothing is lost against a global scale of full precision.
    """

    kind: ClassVar[str] = "nvfp4"
    fixed_blocks: ClassVar[bool] = True

    group_size: int | None = 16

    def fit(self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None) -> Params:
        """The best of 12 scales per group, from 0.6 to 1.3 of the one that takes its largest weight to 6.

        Raises:
            UserError: groups do not divide the columns.
        """
        self.check_columns(weight_BOI.shape[2], "weight")
        groups = grouped(weight_BOI.float(), self.group_size)
        importance = grouped_importance(importance_BI, weight_BOI, self.group_size)
        search = Search(groups, importance, lambda group, scale, _: decode_e2m1(encode_e2m1(group / scale)) * scale)
        full = groups.abs().amax(-1, keepdim=True) / LARGEST
        # The widest candidate must fit under the global scale as well.
        exponent = scale_exponent(full.amax((1, 2), keepdim=True) * 1.3)
        for share in torch.linspace(0.6, 1.3, _CANDIDATES).tolist():
            search.offer(_storable(full * share, exponent))
        return Params(scale_BOG=search.best[0][..., 0])

    def encode(self, weight_BOC: Float[Tensor, "B O C"], params_BOC: Params) -> Tensor:
        return encode_e2m1(weight_BOC.float() / params_BOC.scale_BOG)

    def decode(self, codes_BOC: Tensor, params_BOC: Params) -> Float[Tensor, "B O C"]:
        return decode_e2m1(codes_BOC) * params_BOC.scale_BOG

    def nearest_params(self, wanted: Params, current: Params, group: int | None = None) -> Params:  # noqa: ARG002
        exponent = scale_exponent(current.scale_BOG.amax((1, 2), keepdim=True))
        return Params(scale_BOG=_storable(wanted.scale_BOG, exponent))

    def storage_bits(self, rows: int, columns: int) -> float | int:
        return rows * (4 * columns + 8 * math.ceil(columns / (self.group_size or columns))) + 32


def scale_exponent(largest: Tensor) -> Tensor:
    """The least k for which `largest` <= 448 * 2^k, the range of E4M3; 0 where `largest` is."""
    exponent = torch.frexp(largest / E4M3_LARGEST)
    # frexp's mantissa is in [0.5, 1): a quotient that is itself a power of two has mantissa 0.5.
    least = exponent.exponent - (exponent.mantissa == 0.5).int()
    return torch.where(largest > 0, least, 0).clamp(-100, 100)


def split_scale(scale: Tensor, exponent: int | None = None) -> tuple[Tensor, int]:
    """scale = e4m3 * 2^k of ONE matrix, exactly: the E4M3 tensor and k.

    Args:
        scale: of a matrix, or of several that share a global scale (gate and up, as vLLM wants them).
        exponent: k of a larger set that this matrix belongs to; the least possible unless given.
    """
    power = int(scale_exponent(scale.amax()).item()) if exponent is None else exponent
    return (scale / 2.0**power).to(torch.float8_e4m3fn), power


def _storable(scale: Tensor, exponent: Tensor) -> Tensor:
    """The nearest e4m3 * 2^exponent above zero."""
    unit = torch.exp2(exponent.float())
    local = torch.where(scale == 0, 1.0, (scale / unit).clamp(_E4M3_MIN, E4M3_LARGEST))
    return local.to(torch.float8_e4m3fn).float() * unit


GRID = NvFp4
