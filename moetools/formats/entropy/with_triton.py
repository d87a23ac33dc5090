"""The decoder of chunks on a GPU, one warp for each: 32 lanes take a step together and share the words by a prefix sum.

Under `TRITON_INTERPRET=1` (set before triton is imported) the same kernel runs on the CPU, slowly, for tests.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from moetools.formats.entropy import coder
from moetools.formats.entropy.plan import Plan

_LANES = tl.constexpr(coder.LANES)
_LOW = tl.constexpr(coder.LOW)


def decode(plan: Plan) -> tuple[Tensor, Tensor]:
    """Codes of all weights, int8 [N], and whether each chunk ended where it should, bool [C]."""
    slot, first_M = plan.slots()
    device, chunks = slot.device, len(plan.chunk_C)
    place_9C = np.stack([plan.chunk_C, plan.start_C, plan.end_C, plan.place_C, plan.count_C, plan.x_C, plan.column_C,
                         plan.columns_C, first_M[plan.matrix_C]])  # fmt: skip
    codes_N = torch.empty(plan.weights, dtype=torch.int8, device=device)
    good_C = torch.zeros(chunks, dtype=torch.int8, device=device)
    if chunks:
        _decode_chunk[(chunks,)](
            torch.from_numpy(place_9C).to(device), plan.word_W, plan.state_CL, plan.table_X, slot, codes_N, good_C,
            chunks, num_warps=1,
        )  # fmt: skip
    return codes_N, good_C.bool()


@triton.jit
def _decode_chunk(place_9C, word_W, state_CL, table_X, slot, codes_N, good_C, chunks):
    """One chunk; a slot is its code, one less than its frequency and its place, of 8, 11 and 11 bits."""
    lane_L = tl.arange(0, _LANES)
    chunk = tl.program_id(0)
    number = tl.load(place_9C + chunk)
    at = tl.load(place_9C + chunks + chunk)
    end = tl.load(place_9C + 2 * chunks + chunk)
    out = tl.load(place_9C + 3 * chunks + chunk)
    count = tl.load(place_9C + 4 * chunks + chunk).to(tl.int32)
    x = tl.load(place_9C + 5 * chunks + chunk)
    column = tl.load(place_9C + 6 * chunks + chunk).to(tl.int32)
    columns = tl.load(place_9C + 7 * chunks + chunk).to(tl.int32)
    first = tl.load(place_9C + 8 * chunks + chunk).to(tl.int32)
    state_L = tl.load(state_CL + number * _LANES + lane_L)
    for begin in range(0, count, _LANES):
        used_L = begin + lane_L < count
        table_L = tl.load(table_X + x + column + lane_L).to(tl.int32)
        entry_L = tl.load(slot + first + table_L * 2048 + (state_L & 2047))
        tl.store(codes_N + out + begin + lane_L, (entry_L & 255).to(tl.int8), mask=used_L)
        new_L = (((entry_L >> 8) & 2047) + 1) * (state_L >> 11) + (entry_L >> 19)
        empty_L = used_L & (new_L < _LOW)
        rank_L = tl.cumsum(empty_L.to(tl.int32), 0)
        place_L = at + rank_L - 1
        word_L = tl.load(word_W + place_L, mask=empty_L & (place_L < end), other=0).to(tl.int32) & 0xFFFF
        new_L = tl.where(empty_L, (new_L << 16) | word_L, new_L)
        state_L = tl.where(used_L, new_L, state_L)
        at += tl.sum(empty_L.to(tl.int32), 0)
        column = (column + _LANES) % columns
    wrong = tl.sum((state_L != _LOW).to(tl.int32), 0)
    tl.store(good_C + chunk, ((wrong == 0) & (at == end)).to(tl.int8))
