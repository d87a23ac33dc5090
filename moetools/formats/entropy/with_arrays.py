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
    # Copies: the places and states are counted on.
    tensors = (sorted_C.clone(), slot, plan.table_X.long() * TOTAL, plan.word_W, plan.state_CL[sorted_C[-1]])
    # On a CPU tensor and array are the same memory.
    arrays = tensors if _on_gpu(slot) else tuple(tensor.numpy() for tensor in tensors)
    code_SCL, state_CL, at_C = _run(plan.count_C[order_C], *arrays)
    code_N = _in_order(code_SCL, np.argsort(order_C, kind="stable"), plan.count_C)
    good_C = np.empty(len(order_C), bool)
    good_C[order_C] = torch.as_tensor((state_CL == LOW).all(1)).cpu() & (torch.as_tensor(at_C) == sorted_C[1]).cpu()
    return torch.as_tensor(code_N).view(torch.int8), torch.from_numpy(good_C)


def _on_gpu(slot: Tensor) -> bool:
    return slot.device.type != "cpu"


def _in_order(code_SCL: Any, back_C: np.ndarray, count_C: np.ndarray) -> Any:
    """Codes of one chunk behind the other."""
    code_CN = code_SCL.swapaxes(0, 1).reshape(len(back_C), len(code_SCL) * LANES)
    used_CN = count_C[:, None] > np.arange(code_CN.shape[1])
    if isinstance(code_CN, np.ndarray):
        return code_CN[back_C][used_CN]
    return code_CN[torch.from_numpy(back_C).to(code_CN.device)][torch.from_numpy(used_CN).to(code_CN.device)]


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
        old_CL = state_CL[:left]
        place_CL = first_X.take((x_C[:left] + column_C[:left])[:, None] + lane_L)
        place_CL += first_C[:left, None]
        place_CL += old_CL & (TOTAL - 1)
        entry_CL = slot.take(place_CL)
        code_SCL[step, :left] = entry_CL & 255
        new_CL = old_CL >> PRECISION
        new_CL *= (entry_CL >> SYMBOL_BITS & (1 << FREQUENCY_BITS) - 1) + 1
        new_CL += entry_CL >> (SYMBOL_BITS + FREQUENCY_BITS)
        empty_CL = new_CL < LOW
        if count_C[left - 1] < LANES * (step + 1):
            used_CL = _mask(count_C[:left] - LANES * step, slot)
            empty_CL &= used_CL
            new_CL = old_CL + used_CL * (new_CL - old_CL)
        rank_CL = empty_CL.cumsum(1)
        word_CL = _words(word_W, at_C[:left, None] + rank_CL - 1)
        # Where it is empty: state * 2^16 + word.
        new_CL += empty_CL * (new_CL * 0xFFFF + word_CL)
        state_CL[:left] = new_CL
        # A damaged chunk stays one word behind its end, where it cannot come back from.
        at_C[:left] = (at_C[:left] + rank_CL[:, -1]).clip(None, end_C[:left] + 1)
        column_C[:left] = (column_C[:left] + LANES) % columns_C[:left]
    return code_SCL, state_CL, at_C


def _mask(count_C: np.ndarray, slot: Any) -> Any:
    """Which lanes still have a weight, [C, 32]."""
    used_CL = count_C[:, None] > np.arange(LANES)
    return used_CL if isinstance(slot, np.ndarray) else torch.from_numpy(used_CL).to(slot.device)


def _words(word_W: Any, place_CL: Any) -> Any:
    """Words, without a sign."""
    if isinstance(word_W, np.ndarray):
        return word_W.view(np.uint16).take(place_CL)
    return word_W.take(place_CL).int() & 0xFFFF
