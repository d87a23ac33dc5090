"""Matrices on an entropy grid as one byte string each: below one bit per weight, decodable a few rows at a time.

Layout (little endian): the header; exponents of the columns' steps and numbers of their tables, both bit-packed; the
tables, half frequencies of the magnitudes 1, 2, ... of each as LEB128 numbers; lengths and states of the
lanes, bit-packed; words of the lanes, 2 bytes each. A lane is a run of whole rows, one where rows are long.
"""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.errors import CheckpointError
from moetools.formats import _rans
from moetools.grids.base import Params, Quantized
from moetools.grids.entropy import OCTAVE, ColumnTables, EntropyGrid, rows_per_lane, scale_factors

SUFFIX = "_entropy"
_MAGIC = b"ME1"
_HEADER = struct.Struct("<3sBBBBBIIHhIff")
"""Magic, levels, tables, highest magnitude, bits of an exponent, bits of a length, rows, columns, rows per lane, least
exponent, least length, step, rate. The checksum of all other bytes follows."""
_CHECKSUM = struct.Struct("<I")
_HINT = "download or write this checkpoint again"
_MOST_STEPS = 2**17
"""Of a lane. A step of one lane takes as long as that of a thousand: a lone long lane costs most for its bytes."""
_FREE_WEIGHTS, _WEIGHTS_PER_BYTE = 2**25, 256
"""Weights that a stream of any length may stand for, and those for each of its bytes where they are more. The lowest
rate that is written has 160 a byte; only a matrix of nothing but zeros has more."""
_DECODE_WEIGHTS = 2**25
"""Weights that are decoded at a time; they take 6 bytes each meanwhile."""


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """What the bytes of one matrix say, on the device that decodes it.

    Attributes:
        step_I: steps of the columns.
        table_I, frequency_KA: the columns' tables; symbol a is code a - A // 2.
    """

    name: str
    grid: EntropyGrid
    rows: int
    rows_per_lane: int
    step_I: Float[Tensor, "I"]
    table_I: Int[Tensor, "I"]
    frequency_KA: Int[Tensor, "K A"]
    streams: _rans.Streams

    @property
    def layout(self) -> tuple[int, int, int]:
        """Matrices of one layout can be decoded together."""
        return self.rows, len(self.step_I), self.rows_per_lane

    @property
    def steps(self) -> int:
        """Weights of a lane."""
        return self.rows_per_lane * len(self.step_I)


def pack(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """`{name}_entropy`: the bytes of one matrix (a batch of one), uint8, in main memory."""
    codes_OI = quantized.codes_BOI[0]
    grid = quantized.grid
    assert isinstance(grid, EntropyGrid)
    assert len(quantized.codes_BOI) == 1
    tables = ColumnTables.fit(codes_OI)
    half_KA = _half_frequencies(tables.count_KA)
    lane_rows = rows_per_lane(*codes_OI.shape)
    streams = _encode(codes_OI, tables.table_I, half_KA, lane_rows)

    exponent_I, step = _exponents(quantized.params.scale_BOG[0].cpu())
    least_exponent, exponent_bits, exponents = _pack_offsets(exponent_I)
    least_length, length_bits, lengths = _pack_offsets(streams.length_L)
    fields = (grid.levels, *half_KA.shape, exponent_bits, length_bits, *codes_OI.shape, lane_rows)
    header = _HEADER.pack(_MAGIC, *fields, least_exponent, least_length, step, grid.rate)
    body = b"".join(
        [
            exponents,
            _pack_bits(tables.table_I, _table_bits(len(half_KA))),
            b"".join(_leb128(value) for value in half_KA.flatten().tolist()),
            lengths,
            _pack_bits(streams.state_L, _rans.STATE_BITS),
            streams.word_W.cpu().numpy().astype("<u2").tobytes(),
        ]
    )
    checksum = _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(header)))
    return {name + SUFFIX: torch.frombuffer(bytearray(header + checksum + body), dtype=torch.uint8)}


def unpack(name: str, tensors: Mapping[str, Tensor]) -> Quantized:
    """The matrix again, as a batch of one: codes and steps exactly as packed, on the device of the bytes.

    Raises:
        CheckpointError: bytes are missing, damaged or not of this format; the message names the tensor.
    """
    return unpack_many([(name, tensors)])[0]


def unpack_many(named: Sequence[tuple[str, Mapping[str, Tensor]]]) -> list[Quantized]:
    """`unpack` of several matrices. Those of one shape are decoded together, much faster than one by one.

    Raises:
        CheckpointError: as `unpack`.
    """
    parsed = [_parse(name, tensors) for name, tensors in named]
    result: dict[int, Quantized] = {}
    for layout in dict.fromkeys(matrix.layout for matrix in parsed):
        alike = [number for number, matrix in enumerate(parsed) if matrix.layout == layout]
        share = max(1, _DECODE_WEIGHTS // max(1, layout[0] * layout[1]))
        for start in range(0, len(alike), share):
            some = alike[start : start + share]
            codes_BRI = _decode([parsed[number] for number in some], [parsed[number].streams for number in some])
            for number, codes_RI in zip(some, codes_BRI, strict=True):
                result[number] = _quantized(parsed[number], codes_RI[: parsed[number].rows])
    return [result[number] for number in range(len(parsed))]


def decode_rows(name: str, tensors: Mapping[str, Tensor], rows_R: Int[Tensor, "R"]) -> Float[Tensor, "R I"]:
    """Values of some rows, fp32; only the lanes that hold them are decoded.

    Raises:
        CheckpointError: as `unpack`.
    """
    matrix = _parse(name, tensors)
    lane_R = torch.div(rows_R.to(matrix.table_I.device), matrix.rows_per_lane, rounding_mode="floor")
    lane_L, place_R = lane_R.unique(return_inverse=True)
    codes_QI = _decode([matrix], [matrix.streams.lanes(lane_L)])[0]
    row_R = place_R * matrix.rows_per_lane + rows_R.to(lane_R.device) % matrix.rows_per_lane
    return codes_QI[row_R].float() * matrix.step_I


def shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of a packed matrix, from its header alone; the checksum is not looked at.

    Raises:
        CheckpointError: bytes that are not of this format.
    """
    header = _header(name, tensors)
    return header.rows, header.columns


def _encode(codes_OI: Tensor, table_I: Tensor, half_KA: Tensor, lane_rows: int) -> _rans.Streams:
    """Lanes of whole rows; the last one is filled up with rows of zeros."""
    rows, columns = codes_OI.shape
    lanes, highest = math.ceil(rows / lane_rows), half_KA.shape[1]
    missing = codes_OI.new_zeros((lanes * lane_rows - rows, columns))
    symbol_OI = (torch.cat([codes_OI, missing]).int() + highest).to(torch.uint8)
    symbol_SL = symbol_OI.view(lanes, lane_rows * columns).T.contiguous()
    return _rans.encode(symbol_SL, table_I.repeat(lane_rows), _both_signs(half_KA))


def _decode(matrices: list[_Matrix], streams: list[_rans.Streams]) -> Tensor:
    """Codes [B, lanes * rows per lane, I], int8, of matrices of one layout (or of equally many lanes of them)."""
    some = matrices[0]
    highest = max(matrix.frequency_KA.shape[1] // 2 for matrix in matrices)
    tables = max(len(matrix.frequency_KA) for matrix in matrices)
    frequency_BKA = torch.stack([_widen(matrix.frequency_KA, tables, highest) for matrix in matrices])
    joined = _rans.Streams(
        state_L=torch.cat([lanes.state_L for lanes in streams]),
        length_L=torch.cat([lanes.length_L for lanes in streams]),
        word_W=torch.cat([lanes.word_W for lanes in streams]),
    )
    symbol_SL = _rans.decode(joined, some.steps, torch.stack([matrix.table_I for matrix in matrices]), frequency_BKA)
    if symbol_SL is None:
        names = ", ".join(f"'{matrix.name}'" for matrix in matrices)
        raise CheckpointError(f"the code of {names} does not end where it should: it is damaged", hint=_HINT)
    codes_LS = (symbol_SL.to(torch.int16) - highest).to(torch.int8).T.contiguous()
    lane_rows = len(codes_LS) // len(matrices) * some.rows_per_lane
    return codes_LS.view(len(matrices), lane_rows, len(some.step_I))


def _quantized(matrix: _Matrix, codes_OI: Tensor) -> Quantized:
    scale_BOI = matrix.step_I.expand(1, *codes_OI.shape)
    return Quantized(grid=matrix.grid, codes_BOI=codes_OI[None], params=Params(scale_BOG=scale_BOI))


def _parse(name: str, tensors: Mapping[str, Tensor]) -> _Matrix:
    """Header and tables, after the checksum was found right."""
    header = _header(name, tensors)
    blob = tensors[name + SUFFIX]
    device, data = blob.device, blob.cpu().numpy().tobytes()
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    body = _Bytes(data, _HEADER.size + _CHECKSUM.size)
    if zlib.crc32(memoryview(data)[body.place :], zlib.crc32(data[: _HEADER.size])) != checksum:
        raise _damaged(name, "its checksum is wrong")
    try:
        return _sections(name, header, body, device)
    except _ImpossibleError as error:
        raise _damaged(name, str(error)) from None


def _sections(name: str, header: "_Header", body: "_Bytes", device: torch.device) -> _Matrix:
    """Every section behind the header, each checked before the next depends on it."""
    exponent_I = body.packed(header.columns, header.exponent_bits) + header.least_exponent
    step_I = torch.tensor(header.step) * scale_factors(exponent_I)
    _require(bool(torch.isfinite(step_I).all()), "a step is not finite")
    table_I = body.packed(header.columns, _table_bits(header.tables))
    _require(not header.columns or int(table_I.max()) < header.tables, "a column has no table")
    half_KA = body.leb128(header.tables * header.highest, _rans.TOTAL // 2).view(header.tables, header.highest)
    _require(bool((2 * half_KA.sum(1) <= _rans.TOTAL).all()), "the frequencies of a table are too many")
    lanes = header.lanes
    length_L = body.packed(lanes, header.length_bits) + header.least_length
    state_L = body.packed(lanes, _rans.STATE_BITS)
    _require(bool((state_L >= _rans.LOW).all()), "a lane has no state")
    _require(2 * int(length_L.sum()) == body.left, "the lanes' words are not as many as there are")
    return _Matrix(
        name=name,
        grid=EntropyGrid(rate=header.rate, levels=header.levels),
        rows=header.rows,
        rows_per_lane=header.lane_rows,
        step_I=step_I.to(device),
        table_I=table_I.to(device),
        frequency_KA=_both_signs(half_KA).to(device),
        streams=_rans.Streams(
            state_L=state_L.to(device),
            length_L=length_L.to(device),
            word_W=body.numbers(body.left // 2, "<u2").to(device=device, dtype=torch.int32),
        ),
    )


class _ImpossibleError(Exception):
    """What a section says cannot be; turned into a `CheckpointError` that names the tensor."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _ImpossibleError(otherwise)


def _damaged(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"tensor '{name + SUFFIX}' is damaged: {what}", hint=_HINT)


@dataclass(frozen=True)
class _Header:
    """The fields of `_HEADER` behind the magic, in its order."""

    levels: int
    tables: int
    highest: int
    exponent_bits: int
    length_bits: int
    rows: int
    columns: int
    lane_rows: int
    least_exponent: int
    least_length: int
    step: float
    rate: float

    @property
    def lanes(self) -> int:
        return -(-self.rows // self.lane_rows)

    def check(self, nbytes: int) -> None:
        """Raises _ImpossibleError for what `pack` never writes, and for more than `nbytes` can stand for."""
        _require(1 <= self.levels <= 127 and self.highest <= self.levels, f"levels {self.levels}, {self.highest}")
        _require(self.lane_rows >= 1 and (self.tables >= 1 or not self.columns), "no tables or no lanes")
        _require(self.exponent_bits <= 17 and self.length_bits <= 32, "numbers of too many bits")
        _require(0 < self.step < math.inf and 0.05 <= self.rate <= 6, f"step {self.step}, rate {self.rate}")
        _require(self.lane_rows <= max(1, self.rows), "lanes of more rows than there are")
        _require(self.lane_rows * self.columns <= _MOST_STEPS, f"lanes of {self.columns} columns")
        bits = self.lanes * (_rans.STATE_BITS + self.length_bits) + self.columns * self.exponent_bits
        _require(bits <= 8 * nbytes, f"{nbytes} bytes are too few for {self.rows} rows of {self.columns}")
        most = max(_FREE_WEIGHTS, _WEIGHTS_PER_BYTE * nbytes)
        _require(self.rows * self.columns <= most, f"{nbytes} bytes for [{self.rows}, {self.columns}]")


def _header(name: str, tensors: Mapping[str, Tensor]) -> _Header:
    """The fields of `_HEADER`, each possible for the bytes there are."""
    key = name + SUFFIX
    if key not in tensors:
        raise CheckpointError(f"tensor '{key}' is missing", hint=_HINT)
    start = tensors[key][: _HEADER.size + _CHECKSUM.size].cpu()
    if start.dtype != torch.uint8 or start.dim() != 1 or len(start) < _HEADER.size + _CHECKSUM.size:
        raise CheckpointError(f"tensor '{key}' is too short or no string of bytes", hint=_HINT)
    fields = _HEADER.unpack_from(start.numpy().tobytes())
    if fields[0] != _MAGIC:
        raise CheckpointError(f"tensor '{key}' is no entropy-coded matrix of a known version", hint=_HINT)
    header = _Header(*fields[1:])
    try:
        header.check(tensors[key].numel())
    except _ImpossibleError as error:
        raise _damaged(name, str(error)) from None
    return header


def _half_frequencies(count_KA: Tensor) -> Tensor:
    """Frequencies of +a (and of -a) for a = 1, 2, ..., int64 [K, A - 1]; code 0 has the rest of the 4096 slots.

    At least 1 wherever the magnitude occurs, and at least 1 for 0 if it does.
    """
    total_K1 = count_KA.sum(1, keepdim=True).clamp(min=1)
    half_KA = (count_KA[:, 1:] * (_rans.TOTAL / 2) / total_K1).round().long()
    half_KA = torch.where(count_KA[:, 1:] > 0, half_KA.clamp(min=1), 0)
    for half_A, count_A in zip(half_KA, count_KA, strict=True):
        room = (_rans.TOTAL - int(count_A[0] > 0)) // 2
        while int(half_A.sum()) > room:
            half_A[half_A.argmax()] -= 1
    return half_KA


def _both_signs(half_KA: Tensor) -> Tensor:
    """Frequencies of the codes -highest ... highest."""
    zero_K1 = _rans.TOTAL - 2 * half_KA.sum(1, keepdim=True)
    return torch.cat([half_KA.flip(1), zero_K1, half_KA], 1)


def _widen(frequency_KA: Tensor, tables: int, highest: int) -> Tensor:
    """The same with more magnitudes, which never occur, and more tables, which are never used."""
    more = highest - frequency_KA.shape[1] // 2
    wide_KA = torch.nn.functional.pad(frequency_KA, (more, more))
    return torch.cat([wide_KA, wide_KA[:1].expand(tables - len(wide_KA), -1)])


def _exponents(scale_OI: Tensor) -> tuple[Tensor, float]:
    """k [I] and step so that the steps are exactly step * 2^(k / 4)."""
    if not scale_OI.numel():
        return torch.zeros(scale_OI.shape[1], dtype=torch.int64), 1.0
    step_I = scale_OI[0]
    exponent_I = ((step_I / step_I[0]).log2() * OCTAVE).round().long()
    made = step_I[0] * scale_factors(exponent_I)
    assert torch.equal(made, step_I), "steps that EntropyGrid.fit did not make"
    return exponent_I, float(step_I[0])


def _table_bits(tables: int) -> int:
    return max(0, tables - 1).bit_length()


def _pack_offsets(value: Tensor) -> tuple[int, int, bytes]:
    """Least value, bits of the largest difference to it, and the differences, packed."""
    if not len(value):
        return 0, 0, b""
    least = int(value.min())
    width = int(value.max() - least).bit_length()
    return least, width, _pack_bits(value - least, width)


def _pack_bits(value: Tensor, width: int) -> bytes:
    """Numbers of `width` bits each, least significant bit first."""
    bits = (value.cpu()[:, None] >> torch.arange(width)) & 1
    return np.packbits(bits.numpy().astype(np.uint8), bitorder="little").tobytes()


def _leb128(value: int) -> bytes:
    """Seven bits a byte, least significant first; the high bit says that more follow."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _leb128(value >> 7)


class _Bytes:
    """Reads the sections of a matrix one after the other."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.place = data, start

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self.data) - self.place

    def packed(self, count: int, width: int) -> Tensor:
        """Inverse of `_pack_bits`."""
        size = (count * width + 7) // 8
        flat = np.unpackbits(self.numbers(size, "u1").numpy(), bitorder="little")[: count * width]
        return (torch.from_numpy(flat.reshape(count, width)).long() << torch.arange(width)).sum(1)

    def leb128(self, count: int, most: int) -> Tensor:
        """Inverse of `_leb128`, for numbers of up to `most`."""
        values = []
        for _ in range(count):
            value = shift = 0
            byte = 128
            while byte & 128:
                _require(self.left > 0 and shift < 28, "its tables are cut off")
                byte = self.data[self.place]
                value |= (byte & 127) << shift
                shift, self.place = shift + 7, self.place + 1
            _require(value <= most, "a frequency is too large")
            values.append(value)
        return torch.tensor(values, dtype=torch.int64)

    def numbers(self, count: int, dtype: str) -> Tensor:
        """`count` numbers of a numpy dtype, at least 32 bits wide unless bytes."""
        _require(count * np.dtype(dtype).itemsize <= self.left, "it is cut off")
        array = np.frombuffer(self.data, dtype, count, self.place)
        self.place += array.nbytes
        return torch.from_numpy(array.astype(np.uint8 if dtype == "u1" else np.int64))
