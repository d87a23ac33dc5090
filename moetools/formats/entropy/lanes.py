"""The older layout of an entropy-coded matrix, which is read and no longer written.

Little endian, in this order: the header; exponents of the columns' steps and numbers of their tables, both bit-packed;
the tables, half frequencies of the magnitudes 1, 2, ... of each as LEB128 numbers; lengths and states of the lanes,
bit-packed; words of the lanes, 2 bytes each. A lane is a run of whole rows, one where rows are long.
"""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.formats.entropy import lane_coder
from moetools.formats.entropy.streams import (
    SUFFIX,
    ImpossibleError,
    Sections,
    bad_end,
    blob_of,
    both_signs,
    damaged,
    require,
    table_bits,
)
from moetools.grids.base import Params, Quantized
from moetools.grids.entropy import EntropyGrid, scale_factors

MAGIC = b"ME1"
_HEADER = struct.Struct("<3sBBBBBIIHhIff")
"""Magic, levels, tables, highest magnitude, bits of an exponent, bits of a length, rows, columns, rows per lane, least
exponent, least length, step, rate. The checksum of all other bytes follows."""
_CHECKSUM = struct.Struct("<I")
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
    streams: lane_coder.Streams

    @property
    def layout(self) -> tuple[int, int, int]:
        """Matrices of one layout can be decoded together."""
        return self.rows, len(self.step_I), self.rows_per_lane

    @property
    def steps(self) -> int:
        """Weights of a lane."""
        return self.rows_per_lane * len(self.step_I)


def unpack_many(named: Sequence[tuple[str, Mapping[str, Tensor]]]) -> list[Quantized]:
    """Codes and steps of several matrices, on the device of their bytes. Those of one shape are decoded together.

    Raises:
        CheckpointError: bytes are missing, damaged or not of this layout; the message names the tensor.
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


def shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of a packed matrix, from its header alone; the checksum is not looked at.

    Raises:
        CheckpointError: bytes that are not of this format.
    """
    header = _header(name, tensors)
    return header.rows, header.columns


def _decode(matrices: list[_Matrix], streams: list[lane_coder.Streams]) -> Tensor:
    """Codes [B, lanes * rows per lane, I], int8, of matrices of one layout (or of equally many lanes of them)."""
    some = matrices[0]
    highest = max(matrix.frequency_KA.shape[1] // 2 for matrix in matrices)
    tables = max(len(matrix.frequency_KA) for matrix in matrices)
    frequency_BKA = torch.stack([_widen(matrix.frequency_KA, tables, highest) for matrix in matrices])
    joined = lane_coder.Streams(
        state_L=torch.cat([lanes.state_L for lanes in streams]),
        length_L=torch.cat([lanes.length_L for lanes in streams]),
        word_W=torch.cat([lanes.word_W for lanes in streams]),
    )
    symbol_SL = lane_coder.decode(
        joined, some.steps, torch.stack([matrix.table_I for matrix in matrices]), frequency_BKA
    )
    if symbol_SL is None:
        bad_end([matrix.name for matrix in matrices])
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
    body = Sections(data, _HEADER.size + _CHECKSUM.size)
    if zlib.crc32(memoryview(data)[body.place :], zlib.crc32(data[: _HEADER.size])) != checksum:
        raise damaged(name, "its checksum is wrong")
    try:
        return _sections(name, header, body, device)
    except ImpossibleError as error:
        raise damaged(name, str(error)) from None


def _sections(name: str, header: "_Header", body: "Sections", device: torch.device) -> _Matrix:
    """Every section behind the header, each checked before the next depends on it."""
    exponent_I = body.packed(header.columns, header.exponent_bits) + header.least_exponent
    step_I = torch.tensor(header.step) * scale_factors(exponent_I)
    require(bool(torch.isfinite(step_I).all()), "a step is not finite")
    table_I = body.packed(header.columns, table_bits(header.tables))
    require(not header.columns or int(table_I.max()) < header.tables, "a column has no table")
    half_KA = body.leb128(header.tables * header.highest, lane_coder.TOTAL // 2).view(header.tables, header.highest)
    require(bool((2 * half_KA.sum(1) <= lane_coder.TOTAL).all()), "the frequencies of a table are too many")
    lanes = header.lanes
    length_L = body.packed(lanes, header.length_bits) + header.least_length
    state_L = body.packed(lanes, lane_coder.STATE_BITS)
    require(bool((state_L >= lane_coder.LOW).all()), "a lane has no state")
    require(2 * int(length_L.sum()) == body.left, "the lanes' words are not as many as there are")
    return _Matrix(
        name=name,
        grid=EntropyGrid(rate=header.rate, levels=header.levels),
        rows=header.rows,
        rows_per_lane=header.lane_rows,
        step_I=step_I.to(device),
        table_I=table_I.to(device),
        frequency_KA=both_signs(half_KA, lane_coder.TOTAL).to(device),
        streams=lane_coder.Streams(
            state_L=state_L.to(device),
            length_L=length_L.to(device),
            word_W=body.numbers(body.left // 2, "<u2").to(device=device, dtype=torch.int32),
        ),
    )


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
        """Raises ImpossibleError for what `pack` never writes, and for more than `nbytes` can stand for."""
        require(1 <= self.levels <= 127 and self.highest <= self.levels, f"levels {self.levels}, {self.highest}")
        require(self.lane_rows >= 1 and (self.tables >= 1 or not self.columns), "no tables or no lanes")
        require(self.exponent_bits <= 17 and self.length_bits <= 32, "numbers of too many bits")
        require(0 < self.step < math.inf and 0.05 <= self.rate <= 6, f"step {self.step}, rate {self.rate}")
        require(self.lane_rows <= max(1, self.rows), "lanes of more rows than there are")
        require(self.lane_rows * self.columns <= _MOST_STEPS, f"lanes of {self.columns} columns")
        bits = self.lanes * (lane_coder.STATE_BITS + self.length_bits) + self.columns * self.exponent_bits
        require(bits <= 8 * nbytes, f"{nbytes} bytes are too few for {self.rows} rows of {self.columns}")
        most = max(_FREE_WEIGHTS, _WEIGHTS_PER_BYTE * nbytes)
        require(self.rows * self.columns <= most, f"{nbytes} bytes for [{self.rows}, {self.columns}]")


def _header(name: str, tensors: Mapping[str, Tensor]) -> _Header:
    """The fields of `_HEADER`, each possible for the bytes there are."""
    blob = blob_of(name, tensors, _HEADER.size + _CHECKSUM.size)
    fields = _HEADER.unpack_from(blob[: _HEADER.size].cpu().numpy().tobytes())
    assert fields[0] == MAGIC
    header = _Header(*fields[1:])
    try:
        header.check(len(blob))
    except ImpossibleError as error:
        raise damaged(name, str(error)) from None
    return header


def _widen(frequency_KA: Tensor, tables: int, highest: int) -> Tensor:
    """The same with more magnitudes, which never occur, and more tables, which are never used."""
    more = highest - frequency_KA.shape[1] // 2
    wide_KA = torch.nn.functional.pad(frequency_KA, (more, more))
    return torch.cat([wide_KA, wide_KA[:1].expand(tables - len(wide_KA), -1)])
