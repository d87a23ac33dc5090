"""The chunked layout: one matrix as bytes that are decoded in parallel.

Little endian, in this order: the header; exponents of the columns' steps and numbers of their tables, both bit-packed;
the tables, half frequencies of the magnitudes 1, 2, ... of each as LEB128 numbers; zeros up to a multiple of four
bytes; words of each chunk, 4 bytes; 32 states of each chunk, 4 bytes each; words of all chunks, 2 bytes each. The
CRC-32 in the header is that of all other bytes.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.formats.entropy import coder
from moetools.formats.entropy.streams import (
    SUFFIX,
    ImpossibleError,
    Sections,
    blob_of,
    both_signs,
    damaged,
    exponents,
    leb128,
    pack_bits,
    pack_offsets,
    require,
    table_bits,
)
from moetools.grids.base import Quantized
from moetools.grids.entropy import ColumnTables, EntropyGrid, chunks_of, scale_factors

MAGIC = b"ME2"
_HEADER = struct.Struct("<3sBBBBBIIIhxxff")
"""Magic, levels, tables, highest magnitude, bits of an exponent, lanes, rows, columns, steps of a chunk, least
exponent, step, rate. The checksum of all other bytes follows."""
_CHECKSUM = struct.Struct("<I")
_MOST_STEPS = 2**12
_MOST_TABLES = 64
_FREE_WEIGHTS, _WEIGHTS_PER_BYTE = 2**25, 256
"""Weights that a stream of any length may stand for, and those for each of its bytes where they are more. The lowest
rate that is written has 160 a byte; only a matrix of nothing but zeros has more."""
_FREE_COLUMNS, _COLUMNS_PER_BYTE = 2**20, 64


@dataclass(frozen=True, kw_only=True)
class ChunkedMatrix:
    """What the bytes of one matrix say, in main memory.

    Attributes:
        steps: symbols of a lane of every chunk but the last.
        step_I: steps of the columns.
        table_I, frequency_KA: the columns' tables; symbol a is code a - A // 2.
    """

    name: str
    grid: EntropyGrid
    rows: int
    columns: int
    steps: int
    step_I: Float[Tensor, "I"]
    table_I: Int[Tensor, "I"]
    frequency_KA: Int[Tensor, "K A"]
    code: coder.Code


def pack(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """`{name}_entropy`: the bytes of one matrix (a batch of one), uint8, in main memory."""
    codes_OI = quantized.codes_BOI[0].cpu()
    grid = quantized.grid
    assert isinstance(grid, EntropyGrid)
    assert len(quantized.codes_BOI) == 1
    tables = ColumnTables.fit(codes_OI)
    table_I, half_KA = tables.table_I.cpu(), _half_frequencies(tables.count_KA.cpu())
    steps = chunk_steps(codes_OI.numel())
    symbol_N = (codes_OI.reshape(-1).int() + half_KA.shape[1]).to(torch.uint8)
    code = coder.encode(symbol_N, table_I, both_signs(half_KA, coder.TOTAL), steps)

    exponent_I, step = exponents(quantized.params.scale_BOG[0].cpu())
    least_exponent, exponent_bits, packed_exponents = pack_offsets(exponent_I)
    fields = (grid.levels, *half_KA.shape, exponent_bits, coder.LANES, *codes_OI.shape, steps)
    header = _HEADER.pack(MAGIC, *fields, least_exponent, step, grid.rate)
    start = b"".join(
        [
            packed_exponents,
            pack_bits(table_I, table_bits(len(half_KA))),
            b"".join(leb128(value) for value in half_KA.flatten().tolist()),
        ]
    )
    behind = _HEADER.size + _CHECKSUM.size + len(start)
    body = b"".join(
        [
            start,
            bytes(-behind % 4),
            code.length_C.numpy().astype("<u4").tobytes(),
            code.state_CL.numpy().astype("<u4").tobytes(),
            code.word_W.numpy().astype("<i2").tobytes(),
        ]
    )
    checksum = _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(header)))
    return {name + SUFFIX: torch.frombuffer(bytearray(header + checksum + body), dtype=torch.uint8)}


def parse(name: str, tensors: Mapping[str, Tensor]) -> ChunkedMatrix:
    """Everything but the codes, after the checksum was found right and every field possible.

    Raises:
        CheckpointError: bytes are missing, damaged or not of this layout; the message names the tensor.
    """
    header = _header(name, tensors)
    data = tensors[name + SUFFIX].cpu().numpy().tobytes()
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    body = Sections(data, _HEADER.size + _CHECKSUM.size)
    if zlib.crc32(memoryview(data)[body.place :], zlib.crc32(data[: _HEADER.size])) != checksum:
        raise damaged(name, "its checksum is wrong")
    try:
        return _sections(name, header, body)
    except ImpossibleError as error:
        raise damaged(name, str(error)) from None


def shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of a packed matrix, from its header alone; the checksum is not looked at.

    Raises:
        CheckpointError: bytes that are not of this layout.
    """
    header = _header(name, tensors)
    return header.rows, header.columns


def chunk_steps(weights: int) -> int:
    """Symbols of a lane, so that all chunks are alike."""
    return max(1, math.ceil(weights / (chunks_of(weights) * coder.LANES)))


def _sections(name: str, header: "_Header", body: Sections) -> ChunkedMatrix:
    """Every section behind the header, each checked before the next depends on it."""
    exponent_I = body.packed(header.columns, header.exponent_bits) + header.least_exponent
    step_I = torch.tensor(header.step) * scale_factors(exponent_I)
    require(bool(torch.isfinite(step_I).all()), "a step is not finite")
    table_I = body.packed(header.columns, table_bits(header.tables))
    require(not header.columns or int(table_I.max()) < header.tables, "a column has no table")
    half_KA = body.leb128(header.tables * header.highest, coder.TOTAL // 2).view(header.tables, header.highest)
    require(bool((2 * half_KA.sum(1) <= coder.TOTAL).all()), "the frequencies of a table are too many")
    body.align(4)
    length_C = body.numbers(header.chunks, "<u4")
    state_CL = body.numbers(header.chunks * coder.LANES, "<u4").view(-1, coder.LANES)
    require(bool(((state_CL >= coder.LOW) & (state_CL < 1 << coder.STATE_BITS)).all()), "a lane has no state")
    require(2 * int(length_C.sum()) == body.left, "the chunks' words are not as many as there are")
    return ChunkedMatrix(
        name=name,
        grid=EntropyGrid(rate=header.rate, levels=header.levels),
        rows=header.rows,
        columns=header.columns,
        steps=header.steps,
        step_I=step_I,
        table_I=table_I,
        frequency_KA=both_signs(half_KA, coder.TOTAL),
        code=coder.Code(
            state_CL=state_CL.int(),
            length_C=length_C,
            word_W=torch.from_numpy(body.array(body.left // 2, "<i2").astype(np.int16)),
        ),
    )


@dataclass(frozen=True)
class _Header:
    """The fields of `_HEADER` behind the magic, in its order."""

    levels: int
    tables: int
    highest: int
    exponent_bits: int
    lanes: int
    rows: int
    columns: int
    steps: int
    least_exponent: int
    step: float
    rate: float

    @property
    def chunks(self) -> int:
        return -(-self.rows * self.columns // (self.steps * self.lanes))

    def check(self, nbytes: int) -> None:
        """Raises ImpossibleError for what `pack` never writes, and for more than `nbytes` can stand for."""
        require(1 <= self.levels <= 127 and self.highest <= self.levels, f"levels {self.levels}, {self.highest}")
        require(self.tables <= _MOST_TABLES and (self.tables >= 1 or not self.columns), f"{self.tables} tables")
        require(self.exponent_bits <= 17, "numbers of too many bits")
        require(0 < self.step < math.inf and 0.05 <= self.rate <= 6, f"step {self.step}, rate {self.rate}")
        require(self.lanes == coder.LANES, f"{self.lanes} lanes")
        require(1 <= self.steps <= _MOST_STEPS, f"lanes of {self.steps} weights")
        bits = 32 * self.chunks * (1 + self.lanes) + self.columns * self.exponent_bits
        require(bits <= 8 * nbytes, f"{nbytes} bytes are too few for {self.rows} rows of {self.columns}")
        sizes = f"{nbytes} bytes for [{self.rows}, {self.columns}]"
        require(self.rows * self.columns <= max(_FREE_WEIGHTS, _WEIGHTS_PER_BYTE * nbytes), sizes)
        require(self.columns <= max(_FREE_COLUMNS, _COLUMNS_PER_BYTE * nbytes), sizes)


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


def _half_frequencies(count_KA: Tensor) -> Tensor:
    """Frequencies of +a (and of -a) for a = 1, 2, ..., int64 [K, A - 1]; code 0 has the rest of the 2048 slots.

    At least 1 wherever the magnitude occurs, and at least 1 for 0 if it does. From the rounded shares on, one slot for
    each sign is given or taken where that saves most bits, until nothing does: many rare magnitudes, which must have
    more slots than their share, are not paid for by zero alone.
    """
    total_K1 = count_KA.sum(1, keepdim=True).clamp(min=1)
    half_KA = (count_KA[:, 1:] * (coder.TOTAL / 2) / total_K1).round().long()
    half_KA = torch.where(count_KA[:, 1:] > 0, half_KA.clamp(min=1), 0)
    for half_A, count_A in zip(half_KA.numpy(), count_KA.numpy(), strict=True):
        room = (coder.TOTAL - int(count_A[0] > 0)) // 2
        while half_A.sum() > room:
            half_A[half_A.argmax()] -= 1
        _improve(half_A, float(count_A[0]), count_A[1:].astype(np.float64))
    return half_KA


def _improve(half_A: np.ndarray, zeros: float, count_A: np.ndarray) -> None:
    """Give or take single slots, in place, while the codes get shorter."""
    for _ in range(coder.TOTAL if len(half_A) else 0):
        left = coder.TOTAL - 2 * int(half_A.sum())
        width_A = np.maximum(half_A, 1)
        saved_A = count_A * np.log2((width_A + 1) / width_A)
        lost_A = np.where(half_A > 1, count_A * np.log2(width_A / np.maximum(width_A - 1, 1)), np.inf)
        more, less = int(saved_A.argmax()), int(lost_A.argmin())
        enough = left > 2 or (left == 2 and zeros == 0)
        give = saved_A[more] - (zeros * math.log2(left / (left - 2)) if left > 2 else 0) if enough else -1.0
        take = (zeros * math.log2((left + 2) / left) if left else 0) - lost_A[less]
        if max(give, take) <= 0:
            return
        half_A[more if give >= take else less] += 1 if give >= take else -1
