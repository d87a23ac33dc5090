"""MXFP4 in one stream per matrix: header, exponents, codes.

bytes  0 to 3   CRC-32 of everything behind them (all numbers little-endian)
byte   4        version, 1
bytes  5 to 7   0
bytes  8 to 19  rows O, columns I, columns per scale; uint32 each
then            O * I / size exponents plus 127, a byte each; O * I codes of four bits, the first in the low half
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
from moetools.formats.payloads.integer import bit_bytes, pack_bits, unpack_bits
from moetools.grids.base import Params, Quantized
from moetools.grids.mxfp4 import MxFp4

_HEADER = struct.Struct("<IB3xIII")
_VERSION, _BIAS, _BITS, _NAN = 1, 127, 4, 255
_HINT = "download or write this checkpoint again"


def pack(name: str, quantized: Quantized) -> dict[str, UInt8[Tensor, "N"]]:
    """One tensor of bytes, `name_mxfp4`."""
    matrix, grid = only_matrix(quantized), quantized.grid
    assert isinstance(grid, MxFp4)
    codes_OI = matrix.codes_BOI[0].cpu()
    exponent_OG = torch.frexp(matrix.params.scale_BOG[0].cpu()).exponent - 1 + _BIAS
    pieces = [exponent_OG.to(torch.uint8).reshape(-1), pack_bits(codes_OI, _BITS)]
    header = _HEADER.pack(0, _VERSION, *codes_OI.shape, grid.group_size or codes_OI.shape[1])
    body = header[4:] + b"".join(piece.numpy().tobytes() for piece in pieces)
    whole = zlib.crc32(body).to_bytes(4, "little") + body
    return {f"{name}_mxfp4": torch.from_numpy(np.frombuffer(whole, dtype=np.uint8).copy())}


def stored_bytes(grid: MxFp4, rows: int, columns: int) -> int:
    """Bytes of the stream of a matrix."""
    size = grid.group_size or columns
    return _HEADER.size + rows * (columns // size) + bit_bytes(rows * columns, _BITS)


def unpack(name: str, tensors: Mapping[str, Tensor]) -> Quantized:
    """Codes and scales, on the stream's device.

    Raises:
        CheckpointError: a checksum that does not fit, or impossible contents.
    """
    stream = tensors[f"{name}_mxfp4"]
    grid, rows, columns = _read_header(name, stream, check=True)
    if stream.numel() != stored_bytes(grid, rows, columns):
        raise _corrupt(name, f"{stream.numel()} bytes instead of {stored_bytes(grid, rows, columns)}")
    end = _HEADER.size + rows * columns // (grid.group_size or columns)
    exponent = stream[_HEADER.size : end]
    if bool((exponent == _NAN).any()):
        raise _corrupt(name, "a scale is no number")
    scale_BOG = torch.exp2(exponent.float() - _BIAS).view(1, rows, -1)
    codes = unpack_bits(stream[end:], _BITS, rows * columns).view(1, rows, columns)
    return Quantized(grid=grid, codes_BOI=codes, params=Params(scale_BOG=scale_BOG))


def shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns, from the header."""
    _, rows, columns = _read_header(name, tensors[f"{name}_mxfp4"], check=False)
    return rows, columns


def _read_header(name: str, stream: Tensor, *, check: bool) -> tuple[MxFp4, int, int]:
    if stream.dtype != torch.uint8 or stream.dim() != 1 or stream.numel() < _HEADER.size:
        raise _corrupt(name, f"{stream.dtype} {list(stream.shape)} is no stream of bytes")
    if check:
        whole = stream.cpu().contiguous().numpy()
        if zlib.crc32(whole[4:].data) != int.from_bytes(whole[:4].tobytes(), "little"):
            raise _corrupt(name, "the checksum does not fit")
    header = _HEADER.unpack(bytes(stream[: _HEADER.size].tolist()))
    _, version, rows, columns, size = header
    if version != _VERSION or not rows or not columns or not size or columns % size:
        raise _corrupt(name, f"impossible header {header[1:]}")
    return MxFp4(group_size=size), rows, columns


def _corrupt(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"packed tensor '{name}' is corrupt: {what}", hint=_HINT)
