"""The decoder of chunks by operations on whole arrays: one step of every lane of every chunk at a time.

It runs wherever torch does. On a CPU numpy does the work: an operation on a few numbers takes it a fifth of torch's
time.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetools.formats.entropy.coder import LANES, LOW, PRECISION, TOTAL
from moetools.formats.entropy.plan import FREQUENCY_BITS, SYMBOL_BITS, Plan


def decode(plan: Plan) -> tuple[Tensor, Tensor]:
    """Codes of all weights, int8 [N], and whether each chunk ended where it should, bool [C]."""
    order_C = np.argsort(-plan.count_C, kind="stable")
    slot, first_M = plan.slots()
    per_C = (plan.start_C, plan.end_C, plan.x_C, plan.column_C, plan.columns_C, first_M[plan.matrix_C], plan.chunk_C)
    sorted_C = torch.from_numpy(np.stack(per_C)[:, order_C]).to(slot.device)
    tensors = (sorted_C, slot, plan.table_X.int() * TOTAL, plan.word_W, plan.state_CL[sorted_C[-1]])
    # On a CPU tensor and array are the same memory.
    arrays = tensors if slot.is_cuda else tuple(tensor.numpy() for tensor in tensors)
    code_SCL, state_CL, at_C = (torch.as_tensor(one) for one in _run(plan.count_C[order_C], *arrays))
    good_C = (state_CL == LOW).all(1) & (at_C == sorted_C[1])
    back_C = torch.from_numpy(np.argsort(order_C, kind="stable")).to(slot.device)
    code_CN = code_SCL.permute(1, 0, 2)[back_C].reshape(len(order_C), -1)
    count_C = torch.from_numpy(plan.count_C).to(slot.device)
    used_CN = torch.arange(code_CN.shape[1], device=slot.device) < count_C[:, None]
    return code_CN[used_CN].view(torch.int8), good_C[back_C]


def _run(count_C: np.ndarray, per_C: Any, slot: Any, first_X: Any, word_W: Any, state_CL: Any) -> tuple[Any, Any, Any]:
    """Codes, uint8 [S, C, 32], final states and places behind the last word; torch tensors or numpy arrays.

    The longest chunk comes first, so that those that still have weights are always the first ones.
    """
    numpy = isinstance(slot, np.ndarray)
    at_C, end_C, x_C, column_C, columns_C, first_C, _ = per_C
    lane_L = np.arange(LANES) if numpy else torch.arange(LANES, device=slot.device)
    shape = (int(-(-count_C.max(initial=0) // LANES)), len(count_C), LANES)
    code_SCL = np.zeros(shape, np.uint8) if numpy else slot.new_zeros(shape, dtype=torch.uint8)
    left_S = np.searchsorted(-count_C, -LANES * np.arange(shape[0]))
    for step, left in enumerate(left_S.tolist()):
        x_CL = (x_C[:left] + column_C[:left])[:, None] + lane_L
        old_CL = state_CL[:left]
        entry_CL = slot[first_X[x_CL] + (old_CL & (TOTAL - 1)) + first_C[:left, None]]
        code_SCL[step, :left] = entry_CL & 255
        width_CL = (entry_CL >> SYMBOL_BITS & (1 << FREQUENCY_BITS) - 1) + 1
        new_CL = width_CL * (old_CL >> PRECISION) + (entry_CL >> (SYMBOL_BITS + FREQUENCY_BITS))
        empty_CL = new_CL < LOW
        if count_C[left - 1] < LANES * (step + 1):
            used_CL = _mask(count_C[:left] - LANES * step, slot)
            empty_CL = empty_CL & used_CL
            new_CL = old_CL + used_CL * (new_CL - old_CL)
        rank_CL = empty_CL.cumsum(1)
        word_CL = _words(word_W, at_C[:left, None] + rank_CL - 1)
        # Where it is empty: state * 2^16 + word.
        state_CL[:left] = new_CL + empty_CL * (new_CL * 0xFFFF + word_CL)
        # A damaged chunk stays one word behind its end, where it cannot come back from.
        at_C[:left] = (at_C[:left] + rank_CL[:, -1]).clip(None, end_C[:left] + 1)
        column_C[:left] = (column_C[:left] + LANES) % columns_C[:left]
    return code_SCL, state_CL, at_C


def _mask(count_C: np.ndarray, slot: Any) -> Any:
    """Which lanes still have a weight, [C, 32]."""
    used_CL = count_C[:, None] > np.arange(LANES)
    return used_CL if isinstance(slot, np.ndarray) else torch.from_numpy(used_CL).to(slot.device)


def _words(word_W: Any, place_CL: Any) -> Any:
    """int32 in [0, 2^16)."""
    if isinstance(word_W, np.ndarray):
        return word_W.view(np.uint16)[place_CL].astype(np.int32)
    return word_W[place_CL].int() & 0xFFFF
