"""compressed-tensors' `pack-quantized`: integers of 2 to 8 bits, densely packed into 32-bit words row by row.

`weight_packed` int32 [O, ceil(I * bits / 32)], `weight_scale` [O, G], `weight_shape` int64 [2]; with zero points
`weight_zero_point` int32 [ceil(O * bits / 32), G]. The loader computes (code - zero) * scale in the dtype of the scale.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError
from moetools.formats.base import Format, Packed, UnknownPackingError, only_matrix
from moetools.formats.parts import FLOATS, finite_scale, matrix, part_names, read_int64, torch_name
from moetools.formats.schemes import METHOD, find_weights, module_name, write_config
from moetools.grids.base import Grid, Params, Quantized
from moetools.grids.integer import Integer

_SHAPE_BYTES = 16
"""Of the two int64 of `weight_shape`."""


class PackQuantized(Format):
    """W2 to W8, activations untouched."""

    name: ClassVar[str] = "pack-quantized"
    working_bytes: ClassVar[int] = 12

    def accepts(self, grid: Grid) -> bool:
        return isinstance(grid, Integer) and not grid.float_zero

    def pack(self, name: str, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:  # noqa: ARG002
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        grid = self._grid(quantized)
        matrix = only_matrix(quantized)
        codes_OI = _signed(matrix.codes_BOI[0].cpu(), grid)
        packed = {
            f"{name}_packed": pack_to_int32(codes_OI, grid.bits),
            f"{name}_scale": matrix.params.scale_BOG[0].cpu().to(getattr(torch, grid.scale_dtype)).contiguous(),
            f"{name}_shape": torch.tensor(codes_OI.shape),
        }
        if matrix.params.zero_BOG is not None:
            zero_OG = _signed(matrix.params.zero_BOG[0].cpu().to(torch.uint8), grid)
            packed[f"{name}_zero_point"] = pack_to_int32(zero_OG, grid.bits, packed_dim=0).contiguous()
        return packed

    def stored_bytes(self, grid: Grid, rows: int, columns: int) -> int:
        assert isinstance(grid, Integer)
        groups = math.ceil(columns / (grid.group_size or columns))
        words = rows * math.ceil(columns * grid.bits / 32)
        zero_words = 0 if grid.symmetric else math.ceil(rows * grid.bits / 32) * groups
        scale = getattr(torch, grid.scale_dtype).itemsize
        return 4 * (words + zero_words) + scale * rows * groups + _SHAPE_BYTES

    def dequantize(self, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "B O I"]:  # noqa: ARG002
        return quantized.dequantize().to(getattr(torch, self._grid(quantized).scale_dtype))

    def config(self, grids: Mapping[str, Grid], source: Checkpoint) -> dict[str, Any]:
        schemes = {name: {"input_activations": None, "weights": _weights(grid)} for name, grid in grids.items()}
        return write_config(self.name, schemes, source)

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == METHOD and config.get("format") == self.name

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        found = []
        for name, parts in part_names(checkpoint, "packed", ("scale",), optional=("zero_point", "shape")).items():
            scale, words = matrix(checkpoint, parts["scale"], FLOATS), matrix(checkpoint, parts["packed"], ("I32",))
            scheme = find_weights(checkpoint.config["quantization_config"], module_name(name))
            grid = _integer(name, scheme, scale.dtype)
            columns = grid.group_size * scale.shape[1] if grid.group_size else _stored_columns(checkpoint, name, parts)
            rows = words.shape[0]
            groups = scale.shape[1] if grid.group_size else 1
            if words.shape[1] != -(-columns * grid.bits // 32) or scale.shape != (rows, groups):
                message = f"'{name}': packed {list(words.shape)} with scale {list(scale.shape)}"
                raise CheckpointError(f"{message} is not [{rows}, {columns}] of {grid.bits} bits")
            if not grid.symmetric:
                _check_zeros(checkpoint, name, parts, (-(-rows * grid.bits // 32), groups))
            found.append(Packed(name=name, shape=(rows, columns), dtype=scale.dtype, parts=parts, grid=grid))
        return found

    def unpack(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Quantized:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        grid = packed.grid
        assert isinstance(grid, Integer)
        shape = torch.Size(packed.shape)
        words, scale_OG = tensors[packed.parts["packed"]], tensors[packed.parts["scale"]]
        codes_OI = unpack_from_int32(words, grid.bits, shape)
        zero_BOG = None
        if not grid.symmetric:
            zero = unpack_from_int32(tensors[packed.parts["zero_point"]], grid.bits, scale_OG.shape, packed_dim=0)
            codes_OI, zero_BOG = _unsigned(codes_OI, grid), _unsigned(zero, grid).float()[None]
        params = Params(scale_BOG=finite_scale(packed.name, scale_OG)[None], zero_BOG=zero_BOG)
        return Quantized(grid=grid, codes_BOI=codes_OI[None], params=params)

    def _grid(self, quantized: Quantized) -> Integer:
        if not isinstance(quantized.grid, Integer) or quantized.grid.float_zero:
            raise ValueError(f"{self.name} cannot store {quantized.grid.describe()}")
        return quantized.grid


def _weights(grid: Grid) -> dict[str, Any]:
    assert isinstance(grid, Integer)
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
    }


def _integer(name: str, scheme: Mapping[str, Any], scale_dtype: str) -> Integer:
    if (
        scheme.get("type") != "int"
        or scheme.get("strategy") not in ("group", "channel")
        or scheme.get("actorder") == "group"
    ):
        raise UnknownPackingError(
            f"'{name}': scheme {dict(scheme)} is not read here; read are integers per group or channel"
        )
    bits: int = scheme.get("num_bits") or 0
    group_size = scheme.get("group_size") if scheme["strategy"] == "group" else None
    if bits not in range(2, 9) or (scheme["strategy"] == "group" and (group_size or 0) < 1):
        raise UnknownPackingError(
            f"'{name}': scheme {dict(scheme)} is not read here; read are 2 to 8 bits in whole groups"
        )
    return Integer(
        bits=bits,
        symmetric=scheme.get("symmetric", True),
        group_size=group_size,
        scale_dtype=torch_name(scale_dtype),  # type: ignore[arg-type]
    )


def _check_zeros(checkpoint: Checkpoint, name: str, parts: Mapping[str, str], shape: tuple[int, int]) -> None:
    if "zero_point" not in parts:
        raise CheckpointError(f"'{name}' is not symmetric, but '{name}_zero_point' is missing")
    if matrix(checkpoint, parts["zero_point"], ("I32",)).shape != shape:
        raise CheckpointError(f"'{name}': zero points of another shape than {list(shape)}")


def _stored_columns(checkpoint: Checkpoint, name: str, parts: Mapping[str, str]) -> int:
    """Columns of a matrix with one scale per row, which only the stored shape tells exactly."""
    if "shape" not in parts:
        raise CheckpointError(f"'{name}': no '{name}_shape', so its number of columns is not known")
    rows, columns = read_int64(checkpoint.tensors[parts["shape"]], 2)
    stored = checkpoint.tensors[parts["packed"]].shape
    if rows != stored[0] or not 0 < columns <= 16 * stored[1]:
        raise CheckpointError(f"'{name}': stored shape [{rows}, {columns}] does not fit packed {list(stored)}")
    return columns


def _signed(codes: Tensor, grid: Integer) -> Tensor:
    """compressed-tensors counts from -2^(bits - 1) with and without zero points."""
    return codes if grid.symmetric else (codes.to(torch.int16) - (1 << (grid.bits - 1))).to(torch.int8)


def _unsigned(codes: Tensor, grid: Integer) -> Tensor:
    return (codes.to(torch.int16) + (1 << (grid.bits - 1))).to(torch.uint8)


FORMAT = PackQuantized()
