"""The grids of GGUF's K-quants: groups of 16 or 32 columns whose scales are integers times one number per 256 columns.

Source: `block_q2_K` to `block_q6_K` in ggml's `ggml-common.h`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.errors import UserError
from moetools.grids._search import grouped, grouped_importance, in_pieces
from moetools.grids._units import fitted_offsets, fitted_units, snapped
from moetools.grids.base import Grid, Params, make_grid

COLUMNS = 256
"""Of a super-block."""
_ROUNDS = 4
_CANDIDATES = 10
_LEAST_SHARE = {2: 0.4, 4: 0.7, 5: 0.8}
"""Smallest range tried, as a share of a group's own, by bits."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One of the types.

    Attributes:
        bits: of a code.
        group: columns that share a scale.
        least, most: of the integers that stand for scales.
        offsets: whether groups have offsets, which are subtracted; their integers go from 0 to `most`, codes from 0.
        scale_bits: of such an integer on disk.
    """

    bits: int
    group: int
    least: int
    most: int
    offsets: bool
    scale_bits: int


SHAPES: dict[str, Shape] = {
    "Q2_K": Shape(bits=2, group=16, least=0, most=15, offsets=True, scale_bits=4),
    "Q3_K": Shape(bits=3, group=16, least=-32, most=31, offsets=False, scale_bits=6),
    "Q4_K": Shape(bits=4, group=32, least=0, most=63, offsets=True, scale_bits=6),
    "Q5_K": Shape(bits=5, group=32, least=0, most=63, offsets=True, scale_bits=6),
    "Q6_K": Shape(bits=6, group=16, least=-128, most=127, offsets=False, scale_bits=8),
}


@dataclass(frozen=True, kw_only=True)
class Kquant(Grid):
    """value = code * scale, or code * scale - zero; scale = unit * k, zero = zero_unit * m with integers k and m.

    Units are fp16 numbers, one (or one of each kind) per row and 256 columns. Signed codes are int8 in
    [-2^(bits-1), 2^(bits-1) - 1], those of types with zeros uint8 in [0, 2^bits - 1].

    Attributes:
        type: the name in GGUF.

    Raises:
        UserError: a type that does not exist.
    """

    kind: ClassVar[str] = "kquant"
    fixed_blocks: ClassVar[bool] = True

    type: str

    def __post_init__(self) -> None:
        if self.type not in SHAPES:
            raise UserError(f"no K-quant is called '{self.type}'; legal: {', '.join(SHAPES)}")
        if self.group_size not in (None, self.shape.group):
            raise UserError(f"{self.type} has groups of {self.shape.group} columns, not {self.group_size}")
        object.__setattr__(self, "group_size", self.shape.group)

    @property
    def shape(self) -> Shape:
        """What the type has."""
        return SHAPES[self.type]

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.shape.bits

    @property
    def lowest(self) -> int:
        """Smallest code."""
        return 0 if self.shape.offsets else -(2 ** (self.shape.bits - 1))

    @property
    def highest(self) -> int:
        """Largest code."""
        return self.lowest + 2**self.shape.bits - 1

    def check_columns(self, columns: int, name: str) -> None:
        """Refuse a row length that super-blocks do not divide.

        Raises:
            UserError: naming the tensor.
        """
        if columns % COLUMNS:
            raise UserError(
                f"{self.type} has blocks of {COLUMNS} columns, '{name}' has {columns}",
                hint="`scheme=w4a16` `group_size=32`" if columns % 32 == 0 else "`scheme=w8a16`",
            )

    def fit(self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None) -> Params:
        """Scales, offsets and units of little importance-weighted squared error.

        Starts with scales of the groups' own. Then, some times: units and integers of least squares for
        the codes that the scales lead to (`fitted_units`), new codes, and the best scales of these, on their own again.
        A super-block keeps the best that it had.

        Raises:
            UserError: super-blocks do not divide the columns.
        """
        self.check_columns(weight_BOI.shape[2], "weight")
        return in_pieces(self._fit_rows, weight_BOI.float(), importance_BI)

    def encode(self, weight_BOC: Float[Tensor, "B O C"], params_BOC: Params) -> Tensor:
        code = self._rounded(weight_BOC.float(), params_BOC.scale_BOG, params_BOC.zero_BOG)
        return code.to(torch.uint8 if self.shape.offsets else torch.int8)

    def decode(self, codes_BOC: Tensor, params_BOC: Params) -> Float[Tensor, "B O C"]:
        value = codes_BOC.float() * params_BOC.scale_BOG
        return value if params_BOC.zero_BOG is None else value - params_BOC.zero_BOG

    def slopes(self, codes_BOC: Tensor, params_BOC: Params) -> tuple[Tensor, Tensor]:
        return codes_BOC.float(), -torch.ones_like(params_BOC.scale_BOG).expand(codes_BOC.shape)

    def nearest_params(self, wanted: Params, current: Params, group: int | None = None) -> Params:
        unit, zero_unit = self.units_of_groups(current, group)
        assert unit is not None
        shape = self.shape
        scale = snapped(wanted.scale_BOG, unit, shape.least, shape.most)
        zero = None
        if wanted.zero_BOG is not None and zero_unit is not None:
            zero = snapped(wanted.zero_BOG, zero_unit, 0, shape.most)
        return Params(scale_BOG=scale, zero_BOG=zero, unit_BOS=current.unit_BOS, zero_unit_BOS=current.zero_unit_BOS)

    def units_of_groups(self, params: Params, group: int | None = None) -> tuple[Tensor | None, Tensor | None]:
        """The units of the scales and of the zeros for every group, or for one: [B, O, G]."""
        each = COLUMNS // self.shape.group

        def spread(unit_BOS: Tensor | None) -> Tensor | None:
            if unit_BOS is None:
                return None
            if group is not None:
                return unit_BOS[..., group // each, None]
            return unit_BOS.repeat_interleave(each, dim=2)

        return spread(params.unit_BOS), spread(params.zero_unit_BOS)

    def storage_bits(self, rows: int, columns: int) -> float | int:
        shape = self.shape
        kinds = 1 + shape.offsets
        return rows * (columns * shape.bits + columns // shape.group * shape.scale_bits * kinds + columns // 16 * kinds)

    def _rounded(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        raised = weight if zero is None else weight + zero
        code = torch.where(scale != 0, raised / scale, 0.0)
        return code.round_().clamp_(self.lowest, self.highest)

    def _fit_rows(self, weight_BOI: Tensor, importance_BI: Tensor | None) -> Params:
        weight = grouped(weight_BOI, self.group_size)
        importance = grouped_importance(importance_BI, weight_BOI, self.group_size).expand_as(weight)
        if self.shape.offsets:
            scale, zero = self._fit_groups(weight, importance)
        else:
            own = {"kind": "integer", "bits": self.bits, "group_size": self.group_size, "scale_dtype": "float32"}
            scale, zero = make_grid(own).fit(weight_BOI, importance_BI).scale_BOG, None
        best, least = Params(scale_BOG=scale), None
        for _ in range(_ROUNDS):
            wide = None if zero is None else zero[..., None]
            params = self._storable(scale, zero, self._rounded(weight, scale[..., None], wide), importance)
            stored = None if params.zero_BOG is None else params.zero_BOG[..., None]
            codes = self._rounded(weight, params.scale_BOG[..., None], stored)
            value = codes * params.scale_BOG[..., None] - (0.0 if stored is None else stored)
            error = ((value - weight).square() * importance).sum(-1).unflatten(2, (-1, COLUMNS // self.shape.group))
            error_BOS = error.sum(-1)
            if least is None:
                best, least = params, error_BOS
            else:
                best, least = self._better(error_BOS < least, params, best), torch.minimum(least, error_BOS)
            scale, zero = _least_squares(weight, importance, codes, params)
        return best

    def _fit_groups(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and offsets [B, O, G] of the groups' own: codes from several ranges, each with its least squares."""
        highest = self.highest
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        best, least = (torch.zeros_like(low), torch.zeros_like(low)), torch.full_like(low, torch.inf)
        for share in torch.linspace(_LEAST_SHARE[self.shape.bits], 1.1, _CANDIDATES).tolist():
            for end in (0.0, 0.5):
                # The range shrinks towards the middle, or towards the lowest weight.
                scale = (high - low) * share / highest
                zero = -low - (1 - share) * end * (high - low)
                codes = self._rounded(weight, scale[..., None], zero[..., None])
                found = _least_squares(weight, importance, codes, Params(scale_BOG=scale, zero_BOG=zero))
                assert found[1] is not None
                value = codes * found[0][..., None] - found[1][..., None]
                error = ((value - weight).square() * importance).sum(-1)
                better = error < least
                least = torch.where(better, error, least)
                best = torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1])
        return best

    def _better(self, first_BOS: Tensor, yes: Params, no: Params) -> Params:
        groups = first_BOS.repeat_interleave(COLUMNS // self.shape.group, dim=2)
        chosen = {
            name: torch.where(first_BOS if "unit" in name else groups, value, getattr(no, name))
            for name, value in yes.__dict__.items()
            if value is not None
        }
        return Params(**chosen)

    def _storable(self, scale: Tensor, zero: Tensor | None, codes: Tensor, importance: Tensor) -> Params:
        """Units and integers for scales (and offsets) [B, O, G] of codes [B, O, G, S]."""
        shape, each = self.shape, COLUMNS // self.shape.group
        batch, rows, groups = scale.shape

        def blocks(one: Tensor) -> Tensor:
            return one.reshape(-1, each)

        total = blocks(importance.sum(-1))
        first, second = blocks((importance * codes).sum(-1)), blocks((importance * codes.square()).sum(-1))
        if zero is None:
            unit, k = fitted_units(blocks(scale), second, shape.least, shape.most)
            zeros = {}
        else:
            unit, k, zero_unit, m = fitted_offsets(blocks(scale), blocks(zero), (total, first, second), shape.most)
            zeros = {
                "zero_BOG": (zero_unit * m).view(batch, rows, groups),
                "zero_unit_BOS": zero_unit.view(batch, rows, -1),
            }
        return Params(scale_BOG=(unit * k).view(batch, rows, groups), unit_BOS=unit.view(batch, rows, -1), **zeros)


def _least_squares(weight: Tensor, importance: Tensor, codes: Tensor, params: Params) -> tuple[Tensor, Tensor | None]:
    """The scales (and offsets) [B, O, G] that fit given codes best, whether they can be stored or not."""
    tiny = torch.finfo(torch.float32).tiny
    if params.zero_BOG is None:
        square = (importance * codes.square()).sum(-1)
        best = (importance * codes * weight).sum(-1) / square.clamp(min=tiny)
        return torch.where(square > 0, best, params.scale_BOG), None
    total = importance.sum(-1).clamp(min=tiny)
    mean_code, mean = (importance * codes).sum(-1) / total, (importance * weight).sum(-1) / total
    apart = codes - mean_code[..., None]
    square = (importance * apart.square()).sum(-1)
    slope = (importance * apart * weight).sum(-1) / square.clamp(min=tiny)
    slope = torch.where(square > 0, slope, params.scale_BOG).clamp(min=0)
    offset = slope * mean_code - mean
    # An offset below 0 cannot be stored: then the best scale without one.
    alone = (importance * codes * weight).sum(-1) / (importance * codes.square()).sum(-1).clamp(min=tiny)
    return torch.where(offset < 0, alone.clamp(min=0), slope), offset.clamp(min=0)


GRID = Kquant
