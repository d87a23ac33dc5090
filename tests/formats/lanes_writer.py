"""Writes the older layout of entropy-coded matrices, which moetools only reads: what files of before look like."""

import math
import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from moetools.formats.entropy import lane_coder
from moetools.formats.entropy.streams import both_signs, exponents, leb128, pack_bits, pack_offsets, table_bits
from moetools.grids.base import Quantized
from moetools.grids.entropy import ColumnTables, EntropyGrid

LANE_WEIGHTS = 4096
"""Weights that share one state of the coder: whole rows, at least one."""
HEADER = struct.Struct("<3sBBBBBIIHhIff")


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

    exponent_I, step = exponents(quantized.params.scale_BOG[0].cpu())
    least_exponent, exponent_bits, packed = pack_offsets(exponent_I)
    least_length, length_bits, lengths = pack_offsets(streams.length_L)
    fields = (grid.levels, *half_KA.shape, exponent_bits, length_bits, *codes_OI.shape, lane_rows)
    header = HEADER.pack(b"ME1", *fields, least_exponent, least_length, step, grid.rate)
    body = b"".join(
        [
            packed,
            pack_bits(tables.table_I, table_bits(len(half_KA))),
            b"".join(leb128(value) for value in half_KA.flatten().tolist()),
            lengths,
            pack_bits(streams.state_L, lane_coder.STATE_BITS),
            streams.word_W.cpu().numpy().astype("<u2").tobytes(),
        ]
    )
    checksum = struct.pack("<I", zlib.crc32(body, zlib.crc32(header)))
    return {f"{name}_entropy": torch.frombuffer(bytearray(header + checksum + body), dtype=torch.uint8)}


def encode(symbol_SL: Tensor, table_S: Tensor, frequency_KA: Tensor) -> lane_coder.Streams:
    """Codes lanes of S symbols each, in main memory; symbol s of every lane uses row `table_S[s]` of the frequencies.

    Every symbol that occurs must have a frequency of at least 1 in its table; every table sums to 4096.
    """
    symbol, tables = symbol_SL.cpu().numpy(), table_S.tolist()
    frequency = frequency_KA.cpu().numpy().astype(np.int64)
    start = frequency.cumsum(1) - frequency
    state = np.full(symbol.shape[1], lane_coder.LOW, dtype=np.int64)
    word = np.full(symbol.shape, -1, dtype=np.int32)
    for step in range(len(symbol) - 1, -1, -1):
        width = frequency[tables[step]].take(symbol[step])
        full = state >= width << (lane_coder.STATE_BITS - 12)
        word[step][full] = state[full] & 0xFFFF
        state >>= full * 16
        quotient, rest = np.divmod(state, width)
        state = (quotient << 12) + rest + start[tables[step]].take(symbol[step])
    word_LS = torch.from_numpy(word).T
    written_LS = word_LS >= 0
    return lane_coder.Streams(state_L=torch.from_numpy(state), length_L=written_LS.sum(1), word_W=word_LS[written_LS])


def _encode(codes_OI: Tensor, table_I: Tensor, half_KA: Tensor, lane_rows: int) -> lane_coder.Streams:
    """Lanes of whole rows; the last one is filled up with rows of zeros."""
    rows, columns = codes_OI.shape
    lanes, highest = math.ceil(rows / lane_rows), half_KA.shape[1]
    missing = codes_OI.new_zeros((lanes * lane_rows - rows, columns))
    symbol_OI = (torch.cat([codes_OI, missing]).int() + highest).to(torch.uint8)
    symbol_SL = symbol_OI.view(lanes, lane_rows * columns).T.contiguous()
    return encode(symbol_SL, table_I.repeat(lane_rows), both_signs(half_KA, lane_coder.TOTAL))


def rows_per_lane(rows: int, columns: int) -> int:
    """Rows that are coded as one stream: one where rows are long, else LANE_WEIGHTS / columns or somewhat more.

    Of these the number that fills the last lane best.
    """
    least = max(1, round(LANE_WEIGHTS / max(1, columns)))
    if rows <= least:
        return max(1, rows)
    return min(range(least, least + (least + 1) // 2 + 1), key=lambda lane_rows: (-rows % lane_rows, lane_rows))


def _half_frequencies(count_KA: Tensor) -> Tensor:
    """Frequencies of +a (and of -a) for a = 1, 2, ..., int64 [K, A - 1]; code 0 has the rest of the 4096 slots.

    At least 1 wherever the magnitude occurs, and at least 1 for 0 if it does.
    """
    total_K1 = count_KA.sum(1, keepdim=True).clamp(min=1)
    half_KA = (count_KA[:, 1:] * (lane_coder.TOTAL / 2) / total_K1).round().long()
    half_KA = torch.where(count_KA[:, 1:] > 0, half_KA.clamp(min=1), 0)
    for half_A, count_A in zip(half_KA, count_KA, strict=True):
        room = (lane_coder.TOTAL - int(count_A[0] > 0)) // 2
        while int(half_A.sum()) > room:
            half_A[half_A.argmax()] -= 1
    return half_KA
