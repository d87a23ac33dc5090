"""The decoder of chunks on a CPU, compiled by numba (`pip install 'moetools[fast]'`) when it is first used.

It needs no compiler on the machine. Threads are Python's, as many as torch uses: a kernel holds no lock of Python's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from moetools.formats.entropy.coder import LOW, PRECISION, TOTAL
from moetools.formats.entropy.plan import FREQUENCY_BITS, SYMBOL_BITS, Plan

_THREAD_WEIGHTS = 2**20
"""Weights below which starting threads costs more than they save."""
_jit: Callable[[Any], Any] = numba.njit(nogil=True, boundscheck=False)
_inline: Callable[[Any], Any] = numba.njit(nogil=True, boundscheck=False, inline="always")
_U32 = np.uint32
_LOW, _MASK = _U32(LOW), _U32(TOTAL - 1)
_SYMBOL_BITS, _PLACE_SHIFT, _PRECISION = _U32(SYMBOL_BITS), _U32(SYMBOL_BITS + FREQUENCY_BITS), _U32(PRECISION)
_FREQUENCY_MASK = _U32((1 << FREQUENCY_BITS) - 1)


def decode(plan: Plan) -> tuple[Tensor, Tensor]:
    """Codes of all weights, int8 [N], and whether each chunk ended where it should, bool [C]."""
    codes_N = np.empty(plan.weights, np.int8)
    good_C = np.zeros(len(plan.chunk_C), np.bool_)
    place_C9 = np.stack([plan.matrix_C, plan.chunk_C, plan.start_C, plan.end_C, plan.place_C, plan.count_C, plan.x_C,
                         plan.column_C, plan.columns_C], 1)  # fmt: skip
    arrays = (
        place_C9,
        plan.bank_tables_M2,
        plan.word_W.numpy().view(np.uint16),
        plan.state_CL.numpy(),
        plan.table_X.numpy(),
        plan.frequency_KA.numpy(),
        codes_N,
        good_C,
    )
    threads = min(torch.get_num_threads(), -(-plan.weights // _THREAD_WEIGHTS), max(1, len(good_C)))
    if threads <= 1:
        _decode_chunks(0, len(good_C), *arrays)
    else:
        cuts = np.searchsorted(plan.place_C, np.linspace(0, plan.weights, threads + 1))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first, last: _decode_chunks(first, last, *arrays), cuts[:-1], cuts[1:]))
    return torch.from_numpy(codes_N), torch.from_numpy(good_C)


def times_step(codes_OI: Tensor, step_I: Tensor, result_OI: Tensor) -> None:
    """code * step in fp32, rounded to the nearest bfloat16, ties to even; finite steps only."""
    _round_rows(codes_OI.numpy(), step_I.numpy(), result_OI.view(torch.int16).numpy().view(np.uint16))


@_jit
def _decode_chunks(
    first, last, place_C9, tables_M2, word_W, state_CL, table_X, frequency_KA, codes_N, good_C
):  # pragma: no cover - compiled
    """Chunks first to last - 1, whose matrices' tables are made when the first chunk of each comes."""
    most = 0
    for chunk in range(first, last):
        tables = tables_M2[place_C9[chunk, 0]]
        most = max(most, tables[1] - tables[0])
    slot = np.zeros(max(1, most) * TOTAL, _U32)
    matrix = np.int64(-1)
    for chunk in range(first, last):
        if place_C9[chunk, 0] != matrix:
            matrix = place_C9[chunk, 0]
            _make_slots(frequency_KA[tables_M2[matrix, 0] : tables_M2[matrix, 1]], slot)
        good_C[chunk] = _decode_chunk(place_C9[chunk], word_W, state_CL, table_X, slot, codes_N)


@_jit
def _make_slots(frequency_KA, slot):  # pragma: no cover - compiled
    highest = frequency_KA.shape[1] // 2
    for table in range(frequency_KA.shape[0]):
        at = table * TOTAL
        for symbol in range(frequency_KA.shape[1]):
            width = np.int64(frequency_KA[table, symbol])
            base = _U32((symbol - highest) & 255) | _U32((width - 1) & 2047) << _SYMBOL_BITS
            for place in range(width):
                slot[at] = base | _U32(place) << _PLACE_SHIFT
                at += 1


@_jit
def _decode_chunk(place_9, word_W, state_CL, table_X, slot, codes_N):  # pragma: no cover
    """One chunk; 32 words are readable behind the last, and no step takes more than 32."""
    number, at, end, out, count = place_9[1], place_9[2], place_9[3], place_9[4], place_9[5]
    x, column, columns = place_9[6], place_9[7], place_9[8]
    state = np.empty(32, _U32)
    for lane in range(32):
        state[lane] = _U32(state_CL[number, lane])
    for _ in range(count // 32):
        # A loop of a known length: it becomes straight code, whose lanes the processor interleaves.
        for lane in range(32):
            at = _step(lane, at, state, word_W, table_X[np.uintp(x + column + lane)], slot, codes_N, out + lane)
        if at > end:
            return False
        out += 32
        column += 32
        while column >= columns:
            column -= columns
    for lane in range(count % 32):
        at = _step(lane, at, state, word_W, table_X[np.uintp(x + column + lane)], slot, codes_N, out + lane)
    for lane in range(32):
        if state[lane] != _LOW:
            return False
    return at == end


@_inline
def _step(lane, at, state, word_W, table, slot, codes_N, out):  # pragma: no cover
    """One symbol of a lane; where the words go on behind it."""
    old = state[lane]
    # Unsigned places: signed ones are looked at for being negative.
    entry = slot[_U32(table) << _PRECISION | old & _MASK]
    codes_N[np.uintp(out)] = np.int8(entry & _U32(255))
    width = ((entry >> _SYMBOL_BITS) & _FREQUENCY_MASK) + _U32(1)
    new = width * (old >> _PRECISION) + (entry >> _PLACE_SHIFT)
    empty = new < _LOW
    filled = (new << _U32(16)) | _U32(word_W[np.uintp(at)])
    state[lane] = filled if empty else new
    return at + np.int64(empty)


@_jit
def _round_rows(codes_OI, step_I, result_OI):  # pragma: no cover - compiled
    for row in range(codes_OI.shape[0]):
        for column in range(codes_OI.shape[1]):
            bits = np.float32(np.float32(codes_OI[row, column]) * step_I[column]).view(_U32)
            odd = (bits >> _U32(16)) & _U32(1)
            result_OI[row, column] = np.uint16((bits + _U32(0x7FFF) + odd) >> _U32(16))
