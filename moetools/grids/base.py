"""What every grid gives: scales fitted to weights, codes for values, values for codes.

Letters beside those of `moetools.shapes`: B matrices of one shape (experts), O output rows, I input columns, G groups
of columns that share a scale, C any choice of columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
        zero_BOG: value = (code - zero) * scale; None for symmetric grids.
    """

    scale_BOG: Float[Tensor, "B O G"]
    zero_BOG: Float[Tensor, "B O G"] | None = None

    def columns(self, group_C: Int[Tensor, "C"]) -> "Params":
        """The same per column: column c takes the scale of group `group_C[c]`."""
        zero = None if self.zero_BOG is None else self.zero_BOG[..., group_C]
        return replace(self, scale_BOG=self.scale_BOG[..., group_C], zero_BOG=zero)


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
        zero = None if self.params.zero_BOG is None else self.params.zero_BOG[here]
        params = Params(scale_BOG=self.params.scale_BOG[here], zero_BOG=zero)
        return replace(self, codes_BOI=self.codes_BOI[here], params=params)

    @staticmethod
    def stack(parts: Sequence["Quantized"]) -> "Quantized":
        """All matrices of some batches on one grid, one batch behind the other."""
        if len(parts) == 1:
            return parts[0]
        zeros = [part.params.zero_BOG for part in parts if part.params.zero_BOG is not None]
        params = Params(
            scale_BOG=torch.cat([part.params.scale_BOG for part in parts]), zero_BOG=torch.cat(zeros) if zeros else None
        )
        return replace(parts[0], codes_BOI=torch.cat([part.codes_BOI for part in parts]), params=params)

    def rows(self, rows_R: Int[Tensor, "R"]) -> "Quantized":
        """Some rows of every matrix, in the given order."""
        zero = None if self.params.zero_BOG is None else self.params.zero_BOG[:, rows_R]
        params = Params(scale_BOG=self.params.scale_BOG[:, rows_R], zero_BOG=zero)
        return replace(self, codes_BOI=self.codes_BOI[:, rows_R], params=params)


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

    def nearest_params(self, wanted: Params, current: Params) -> Params | None:  # noqa: ARG002
        """The storable parameters nearest to `wanted`, each rounded by itself; they can replace `current` one by one.

        `wanted` may hold some of the groups only. None where parameters cannot change alone (scales shared over rows):
        methods then keep what `fit` gave.
        """
        return None

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
