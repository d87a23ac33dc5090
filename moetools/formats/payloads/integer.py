"""Integer grids in one stream per matrix: header, scales, zeros, codes without a bit of padding in between.

    bytes  0 to 3   CRC-32 of everything behind them (all numbers little-endian)
    byte   4        version, 1
    byte   5        bits per code, 2 to 8
    byte   6        1 symmetric, 2 ternary, 4 zeros are floats
    byte   7        precision of the scales: 0 bfloat16, 1 float16, 2 float32
    bytes  8 to 23  rows O, columns I, group size (0: one scale per row), 0; uint32 each
    then            O * G scales; with zero points O * G zeros (like scales, or `bits` each); O * I codes

Codes count from the grid's lowest value and are packed least significant bit first; ternary codes five to a byte,
sum_i (code_i + 1) 3^i, which is 1.6 bits each.
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
from moetools.grids.base import Params, Quantized
from moetools.grids.integer import Integer

_HEADER = struct.Struct("<IBBBBIIII")
_VERSION = 1
_SCALES = ("bfloat16", "float16", "float32")
_SYMMETRIC, _TERNARY, _FLOAT_ZERO = 1, 2, 4
_FLAGS = (0, _SYMMETRIC, _SYMMETRIC | _TERNARY, _FLOAT_ZERO)
_TRITS = 5


def pack(name: str, quantized: Quantized) -> dict[str, UInt8[Tensor, "N"]]:
    """One tensor of bytes, `name_integer`."""
    matrix, grid = only_matrix(quantized), quantized.grid
    assert isinstance(grid, Integer)
    codes_OI = matrix.codes_BOI[0].cpu()
    rows, columns = codes_OI.shape
    flags = _SYMMETRIC * grid.symmetric | _TERNARY * grid.ternary | _FLOAT_ZERO * grid.float_zero
    scale = getattr(torch, grid.scale_dtype)
    fields = (_VERSION, grid.bits, flags, _SCALES.index(grid.scale_dtype), rows, columns, grid.group_size or 0, 0)
    pieces = [_as_bytes(matrix.params.scale_BOG[0].cpu().to(scale))]
    if matrix.params.zero_BOG is not None:
        zero_OG = matrix.params.zero_BOG[0].cpu()
        pieces.append(
            _as_bytes(zero_OG.to(scale)) if grid.float_zero else pack_bits(zero_OG.to(torch.uint8), grid.bits)
        )
    raised = (codes_OI.to(torch.int16) - grid.lowest).to(torch.uint8).reshape(-1)
    pieces.append(_pack_trits(raised) if grid.ternary else pack_bits(raised, grid.bits))
    body = _HEADER.pack(0, *fields)[4:] + b"".join(piece.numpy().tobytes() for piece in pieces)
    whole = zlib.crc32(body).to_bytes(4, "little") + body
    return {f"{name}_integer": torch.from_numpy(np.frombuffer(whole, dtype=np.uint8).copy())}


def stored_bytes(grid: Integer, rows: int, columns: int) -> int:
    """Bytes of the stream of a matrix."""
    groups, count = columns // (grid.group_size or columns), rows * columns
    scale = getattr(torch, grid.scale_dtype).itemsize
    zeros = 0 if grid.symmetric else bit_bytes(rows * groups, grid.bits)
    if grid.float_zero:
        zeros = rows * groups * scale
    codes = -(-count // _TRITS) if grid.ternary else bit_bytes(count, grid.bits)
    return _HEADER.size + rows * groups * scale + zeros + codes


def unpack(name: str, tensors: Mapping[str, Tensor]) -> Quantized:
    """Codes and scales, on the stream's device.

    Raises:
        CheckpointError: a checksum that does not fit, or impossible contents.
    """
    return unpack_stream(name, tensors[f"{name}_integer"])


def unpack_stream(name: str, stream: UInt8[Tensor, "N"], *, check: bool = True) -> Quantized:
    """The same from the stream itself; `check=False` for one that was checked before."""
    grid, rows, columns = _read_header(name, stream, check=check)
    groups = columns // (grid.group_size or columns)
    reader = _Reader(name, stream)
    scale_dtype = getattr(torch, grid.scale_dtype)
    scale_OG = reader.take(rows * groups * scale_dtype.itemsize).clone().view(scale_dtype).view(rows, groups)
    zero_BOG = None
    if grid.float_zero:
        zero_BOG = reader.take(rows * groups * scale_dtype.itemsize).clone().view(scale_dtype).view(1, rows, groups)
    elif not grid.symmetric:
        zero_BOG = unpack_bits(reader.take(bit_bytes(rows * groups, grid.bits)), grid.bits, rows * groups)
        zero_BOG = zero_BOG.view(1, rows, groups)
    count = rows * columns
    if grid.ternary:
        raised = _unpack_trits(name, reader.take(-(-count // _TRITS)), count)
    else:
        raised = unpack_bits(reader.take(bit_bytes(count, grid.bits)), grid.bits, count)
    reader.finish()
    codes = (raised.to(torch.int16) + grid.lowest).to(torch.int8) if grid.symmetric else raised
    scale_BOG = finite_scale(name, scale_OG)[None]
    params = Params(scale_BOG=scale_BOG, zero_BOG=None if zero_BOG is None else finite_scale(name, zero_BOG))
    return Quantized(grid=grid, codes_BOI=codes.view(1, rows, columns), params=params)


def shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns, from the header."""
    _, rows, columns = _read_header(name, tensors[f"{name}_integer"], check=False)
    return rows, columns


def _read_header(name: str, stream: Tensor, *, check: bool) -> tuple[Integer, int, int]:
    if stream.dtype != torch.uint8 or stream.dim() != 1 or stream.numel() < _HEADER.size:
        raise _corrupt(name, f"{stream.dtype} {list(stream.shape)} is no stream of bytes")
    if check:
        whole = stream.cpu().contiguous().numpy()
        if zlib.crc32(whole[4:].data) != int.from_bytes(whole[:4].tobytes(), "little"):
            raise _corrupt(name, "the checksum does not fit")
    header = _HEADER.unpack(bytes(stream[: _HEADER.size].tolist()))
    _, version, bits, flags, scale, rows, columns, group_size, zero = header
    legal = version == _VERSION and 2 <= bits <= 8 and flags in _FLAGS and scale < len(_SCALES) and zero == 0
    legal &= bits == 2 or not flags & _TERNARY
    if not legal or not rows or not columns or (group_size and columns % group_size):
        raise _corrupt(name, f"impossible header {header[1:]}")
    grid = Integer(
        bits=bits,
        symmetric=bool(flags & _SYMMETRIC),
        ternary=bool(flags & _TERNARY),
        float_zero=bool(flags & _FLOAT_ZERO),
        scale_dtype=_SCALES[scale],  # type: ignore[arg-type]
        group_size=group_size or None,
    )
    return grid, rows, columns


class _Reader:
    """Takes the stream piece by piece; must end where the stream does."""

    def __init__(self, name: str, stream: Tensor) -> None:
        self._name, self._stream, self._at = name, stream, _HEADER.size

    def take(self, count: int) -> Tensor:
        piece = self._stream[self._at : self._at + count]
        if piece.numel() != count:
            raise _corrupt(self._name, f"{count - piece.numel()} bytes are missing")
        self._at += count
        return piece

    def finish(self) -> None:
        if self._at != self._stream.numel():
            raise _corrupt(self._name, f"{self._stream.numel() - self._at} bytes too many")


def _corrupt(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"packed tensor '{name}' is corrupt: {what}", hint="download or write this checkpoint again")


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def bit_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Eight codes at a time become one 64-bit number, of which `bits` bytes are kept."""
    count = codes.numel()
    padded = torch.nn.functional.pad(codes.reshape(-1), (0, -count % 8)).view(-1, 8)
    words = torch.zeros(padded.shape[0], dtype=torch.int64)
    for place in range(8):
        words |= padded[:, place].long() << (bits * place)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[: bit_bytes(count, bits)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of what `pack_bits` packed."""
    groups = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, groups * bits - packed.numel())).view(groups, bits)
    words = torch.nn.functional.pad(padded, (0, 8 - bits)).contiguous().view(torch.int64)
    codes = torch.empty(groups, 8, dtype=torch.uint8, device=packed.device)
    for place in range(8):
        codes[:, place] = ((words[:, 0] >> (bits * place)) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(-1)[:count]


def _pack_trits(trits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(trits, (0, -trits.numel() % _TRITS)).view(-1, _TRITS)
    powers = torch.tensor([3**place for place in range(_TRITS)], dtype=torch.int16)
    return (padded.to(torch.int16) * powers).sum(1).to(torch.uint8)


def _unpack_trits(name: str, packed: Tensor, count: int) -> Tensor:
    if int(packed.max()) >= 3**_TRITS:
        raise _corrupt(name, f"byte {int(packed.max())} is not five ternary digits")
    table = torch.arange(3**_TRITS)[:, None] // torch.tensor([3**place for place in range(_TRITS)]) % 3
    return table.to(torch.uint8).to(packed.device)[packed.long()].view(-1)[:count]
