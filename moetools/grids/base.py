"""What every grid gives: scales fitted to weights, codes for values, values for codes.

Letters beside those of `moetools.shapes`: B matrices of one shape (experts), O output rows, I input columns, G groups
of columns that share a scale, C any choice of columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Params:
    """Scales (and zeros) of B matrices, as they will be stored: already rounded to the storage precision, in fp32.

    Attributes:
        scale_BOG: one scale per row and group of columns.
        zero_BOG: value = (code - zero) * scale, or as the kind's `decode` has it; None for symmetric grids.
        unit_BOS, zero_unit_BOS: numbers of which the scales and the zeros of S super-blocks of groups are multiples;
            None for grids whose scales are stored one by one.
    """

    scale_BOG: Float[Tensor, "B O G"]
    zero_BOG: Float[Tensor, "B O G"] | None = None
    unit_BOS: Float[Tensor, "B O S"] | None = None
    zero_unit_BOS: Float[Tensor, "B O S"] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Params":
        """All tensors changed alike: some matrices, some rows."""
        present = {name: value for name, value in self.__dict__.items() if value is not None}
        return Params(**{name: change(value) for name, value in present.items()})

    @staticmethod
    def joined(parts: Sequence["Params"], dim: int) -> "Params":
        """One behind the other along matrices (0) or rows (1)."""
        names = [name for name, value in parts[0].__dict__.items() if value is not None]
        return Params(**{name: torch.cat([getattr(part, name) for part in parts], dim) for name in names})

    @staticmethod
    def choose(first: Tensor, yes: "Params", no: "Params") -> "Params":
        """Those of `yes` where `first` (broadcast against every tensor), else those of `no`."""
        names = [name for name, value in yes.__dict__.items() if value is not None]
        return Params(**{name: torch.where(first, getattr(yes, name), getattr(no, name)) for name in names})

    def columns(self, group_C: Int[Tensor, "C"]) -> "Params":
        """Scale and zero per column: column c takes those of group `group_C[c]`."""
        zero = None if self.zero_BOG is None else self.zero_BOG[..., group_C]
        return Params(scale_BOG=self.scale_BOG[..., group_C], zero_BOG=zero)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """B matrices of one shape in quantized form; their values are `grid.decode` of codes and parameters.

    Attributes:
        codes_BOI: int8 for signed integer codes, uint8 for all others (the kind's `decode` says what they mean).
    """

    grid: "Grid"
    codes_BOI: Tensor
    params: Params

    def dequantize(self) -> Float[Tensor, "B O I"]:
        """The values, fp32."""
        group_I = self.grid.group_of_column(self.codes_BOI.shape[2], self.codes_BOI.device)
        return self.grid.decode(self.codes_BOI, self.params.columns(group_I))

    def matrix(self, index: int) -> "Quantized":
        """Matrix `index` alone, as a batch of one."""
        here = slice(index, index + 1)
        return replace(self, codes_BOI=self.codes_BOI[here], params=self.params.each(lambda one: one[here]))

    @staticmethod
    def stack(parts: Sequence["Quantized"]) -> "Quantized":
        """All matrices of some batches on one grid, one batch behind the other."""
        if len(parts) == 1:
            return parts[0]
        params = Params.joined([part.params for part in parts], 0)
        return replace(parts[0], codes_BOI=torch.cat([part.codes_BOI for part in parts]), params=params)

    def rows(self, rows_R: Int[Tensor, "R"]) -> "Quantized":
        """Some rows of every matrix, in the given order."""
        return replace(self, codes_BOI=self.codes_BOI[:, rows_R], params=self.params.each(lambda one: one[:, rows_R]))


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """A family of representable values. Subclasses are frozen dataclasses of plain fields, one per file.

    Attributes:
        prices_codes: the size on disk depends on the codes. Then `fit` is given what an error in a column costs after
            compensation, as sums over slots (matrices compete for bits), and codes are not changed to lower the error.
        fixed_blocks: the format prescribes `group_size`.
        group_size: columns that share a scale; None for one scale per row.
    """

    kind: ClassVar[str]
    prices_codes: ClassVar[bool] = False
    fixed_blocks: ClassVar[bool] = False

    group_size: int | None = None

    @abstractmethod
    def fit(self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None) -> Params:
        """Scales that minimise sum_i importance_i (w_i - decode(encode(w_i)))^2 per group; None is all ones."""

    @abstractmethod
    def encode(self, weight_BOC: Float[Tensor, "B O C"], params_BOC: Params) -> Tensor:
        """Code of the nearest representable value; `params_BOC` are per column (`Params.columns`)."""

    @abstractmethod
    def decode(self, codes_BOC: Tensor, params_BOC: Params) -> Float[Tensor, "B O C"]:
        """Values of codes, fp32."""

    def nearest_params(
        self,
        wanted: Params,  # noqa: ARG002
        current: Params,  # noqa: ARG002
        group: int | None = None,  # noqa: ARG002
    ) -> Params | None:
        """The storable parameters nearest to `wanted`, each rounded by itself; they can replace `current` one by one.

        None where parameters cannot change alone (scales shared over rows): methods then keep what `fit` gave.

        Args:
            current: all groups' parameters.
            group: the only group that `wanted` holds; None: all of them.
        """
        return None

    def slopes(self, codes_BOC: Tensor, params_BOC: Params) -> tuple[Tensor, Tensor]:
        """By how much a value grows with its scale, and with its zero, for given codes: both [B, O, C]."""
        unit = replace(params_BOC, scale_BOG=torch.ones_like(params_BOC.scale_BOG))
        by_scale = self.decode(codes_BOC, unit)
        return by_scale, -params_BOC.scale_BOG.expand_as(by_scale)

    @abstractmethod
    def storage_bits(self, rows: int, columns: int) -> float | int:
        """Bits that a matrix takes on disk, scales and zeros included (an estimate for entropy-coded grids)."""

    def quantize(
        self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None
    ) -> Quantized:
        """Round to nearest with fitted scales."""
        params = self.fit(weight_BOI, importance_BI)
        group_I = self.group_of_column(weight_BOI.shape[2], weight_BOI.device)
        return Quantized(grid=self, codes_BOI=self.encode(weight_BOI.float(), params.columns(group_I)), params=params)

    def group_of_column(self, columns: int, device: torch.device) -> Int[Tensor, "I"]:
        """Index of each column's group."""
        return torch.arange(columns, device=device) // (self.group_size or columns)

    def check_columns(self, columns: int, name: str) -> None:
        """Refuse a row length that groups do not divide.

        Raises:
            UserError: naming the tensor and a group size that would do.
        """
        if self.group_size and columns % self.group_size:
            legal = [size for size in (256, 128, 64, 32, 16, 8) if columns % size == 0]
            hint = f"`group_size={legal[0]}`" if legal else "`group_size=0` for one scale per row"
            if self.fixed_blocks:
                hint = "`scheme=fp8` has one scale per row and takes any shape"
            raise UserError(
                f"group size {self.group_size} does not divide the {columns} columns of '{name}'", hint=hint
            )

    def describe(self) -> dict[str, Any]:
        """JSON-able description; `make_grid` is its inverse."""
        return {"kind": self.kind, **self.__dict__}


def make_grid(description: dict[str, Any]) -> Grid:
    """The grid that `Grid.describe` described."""
    from moetools.plugins import load_plugin

    fields = dict(description)
    return load_plugin("moetools.grids", fields.pop("kind"), kind="grid").GRID(**fields)
