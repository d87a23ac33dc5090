"""K-quant grids in one stream per matrix: header, units, integers of the scales, codes, no padding but to whole bytes.

    bytes  0 to 3   CRC-32 of everything behind them (all numbers little-endian)
    byte   4        version, 1
    byte   5        the type: 2 for Q2_K to 6 for Q6_K
    bytes  6 and 7  0
    bytes  8 to 15  rows O, columns I; uint32 each
    then            O * I / 256 units, fp16, of the scales, and as many of the zeros where there are zeros; one integer
                    per row and group for each of the two kinds; O * I codes

Integers and codes count from the least that the type has and are packed least significant bit first.
"""

import struct
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from moetools.errors import CheckpointError
from moetools.formats.base import only_matrix
from moetools.formats.parts import finite_scale
from moetools.formats.payloads.integer import bit_bytes, pack_bits, unpack_bits
from moetools.grids.base import Params, Quantized
from moetools.grids.kquant import COLUMNS, SHAPES, Kquant

_HEADER = struct.Struct("<IBBHII")
_VERSION = 1
_HINT = "download or write this checkpoint again"


def pack(name: str, quantized: Quantized) -> dict[str, UInt8[Tensor, "N"]]:
    """One tensor of bytes, `name_kquant`."""
    matrix, grid = only_matrix(quantized), quantized.grid
    assert isinstance(grid, Kquant)
    shape, lowest = grid.shape, grid.lowest
    codes_OI, params = matrix.codes_BOI[0].cpu(), matrix.params.each(torch.Tensor.cpu)
    unit, zero_unit = grid.units_of_groups(params)
    assert unit is not None
    assert params.unit_BOS is not None
    units, integers = [params.unit_BOS], [_places(params.scale_BOG, unit, shape.least)]
    if params.zero_BOG is not None and params.zero_unit_BOS is not None and zero_unit is not None:
        units.append(params.zero_unit_BOS)
        integers.append(_places(params.zero_BOG, zero_unit, 0))
    pieces = [one.half().contiguous().view(-1).view(torch.uint8) for one in units]
    pieces += [pack_bits(one, shape.scale_bits) for one in integers]
    pieces.append(pack_bits((codes_OI.to(torch.int16) - lowest).to(torch.uint8), shape.bits))
    fields = (_VERSION, int(grid.type[1]), 0, *codes_OI.shape)
    body = _HEADER.pack(0, *fields)[4:] + b"".join(piece.numpy().tobytes() for piece in pieces)
    whole = zlib.crc32(body).to_bytes(4, "little") + body
    return {f"{name}_kquant": torch.from_numpy(np.frombuffer(whole, dtype=np.uint8).copy())}


def stored_bytes(grid: Kquant, rows: int, columns: int) -> int:
    """Bytes of the stream of a matrix."""
    shape, kinds = grid.shape, 1 + grid.shape.offsets
    units, groups = rows * columns // COLUMNS, rows * columns // shape.group
    return (
        _HEADER.size + kinds * (2 * units + bit_bytes(groups, shape.scale_bits)) + bit_bytes(rows * columns, shape.bits)
    )


def unpack(name: str, tensors: Mapping[str, Tensor]) -> Quantized:
    """Codes and scales, on the stream's device.

    Raises:
        CheckpointError: a checksum that does not fit, or impossible contents.
    """
    stream = tensors[f"{name}_kquant"]
    grid, rows, columns = _read_header(name, stream, check=True)
    shape, at = grid.shape, _HEADER.size
    if stream.numel() != stored_bytes(grid, rows, columns):
        raise _corrupt(name, f"{stream.numel()} bytes instead of {stored_bytes(grid, rows, columns)}")

    def take(count: int) -> Tensor:
        nonlocal at
        at += count
        return stream[at - count : at]

    kinds = 1 + shape.offsets
    blocks, groups = columns // COLUMNS, columns // shape.group
    halves = [take(2 * rows * blocks).clone().view(torch.float16) for _ in range(kinds)]
    units = [finite_scale(name, one.view(1, rows, blocks)) for one in halves]
    packed = [take(bit_bytes(rows * groups, shape.scale_bits)) for _ in range(kinds)]
    raised = [unpack_bits(one, shape.scale_bits, rows * groups).view(1, rows, groups).float() for one in packed]
    codes = unpack_bits(take(bit_bytes(rows * columns, shape.bits)), shape.bits, rows * columns)
    if not shape.offsets:
        codes = (codes.to(torch.int16) + grid.lowest).to(torch.int8)
    each = COLUMNS // shape.group
    scale_BOG = units[0].repeat_interleave(each, dim=2) * (raised[0] + shape.least)
    zeros = {}
    if shape.offsets:
        zeros = {"zero_BOG": units[1].repeat_interleave(each, dim=2) * raised[1], "zero_unit_BOS": units[1]}
    params = Params(scale_BOG=scale_BOG, unit_BOS=units[0], **zeros)
    return Quantized(grid=grid, codes_BOI=codes.view(1, rows, columns), params=params)


def shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns, from the header."""
    _, rows, columns = _read_header(name, tensors[f"{name}_kquant"], check=False)
    return rows, columns


def _places(value_BOG: Tensor, unit_BOG: Tensor, least: int) -> Tensor:
    """The integers that values are of their units, from 0."""
    return (torch.where(unit_BOG != 0, value_BOG / unit_BOG, 0.0).round() - least).to(torch.uint8)


def _read_header(name: str, stream: Tensor, *, check: bool) -> tuple[Kquant, int, int]:
    if stream.dtype != torch.uint8 or stream.dim() != 1 or stream.numel() < _HEADER.size:
        raise _corrupt(name, f"{stream.dtype} {list(stream.shape)} is no stream of bytes")
    if check:
        whole = stream.cpu().contiguous().numpy()
        if zlib.crc32(whole[4:].data) != int.from_bytes(whole[:4].tobytes(), "little"):
            raise _corrupt(name, "the checksum does not fit")
    header = _HEADER.unpack(bytes(stream[: _HEADER.size].tolist()))
    _, version, number, zero, rows, columns = header
    if version != _VERSION or f"Q{number}_K" not in SHAPES or zero or not rows or not columns or columns % COLUMNS:
        raise _corrupt(name, f"impossible header {header[1:]}")
    return Kquant(type=f"Q{number}_K"), rows, columns


def _corrupt(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"packed tensor '{name}' is corrupt: {what}", hint=_HINT)
