"""Range asymmetric numeral systems: many independent streams ("lanes") coded in step, with static tables.

A state x in [2^15, 2^31) stands for all symbols still to come. A symbol that has f of 4096 slots, the first of them
c, is coded by x -> (x div f) * 4096 + x mod f + c and decoded by x -> f * (x div 4096) + x mod 4096 - c; 16 bits leave
or enter x where it would leave its interval. All lanes take step s together, so one tensor operation codes one step of
every lane. Source: J. Duda, arXiv 1311.2540 (rANS); F. Giesen, arXiv 1402.3392 (lanes).

Letters: M matrices, N lanes of a matrix, L = M * N lanes, S steps, I columns (the table changes with the column), K
tables, A symbols, W words of code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PRECISION = 12
TOTAL = 1 << _PRECISION
"""What the frequencies of a table sum to."""
STATE_BITS = 31
LOW = 1 << (STATE_BITS - 16)
"""Smallest state; every lane starts its encoding there and must end its decoding there."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The code of some lanes.

    Attributes:
        state_L: int64 in [2^15, 2^31): what the decoder starts from.
        length_L: int64, words of each lane.
        word_W: int32 in [0, 2^16), lane after lane in reading order.
    """

    state_L: Tensor
    length_L: Tensor
    word_W: Tensor


def decode(streams: Streams, steps: int, table_MI: Tensor, frequency_MKA: Tensor) -> Tensor | None:
    """The symbols, uint8 [S, L], of the lanes of M matrices (N each, in order); None if the code is damaged.

    Step s of a lane uses table `table_MI[m, s mod I]` of its matrix. A lane must end in the state and at the word
    where its encoder began.
    """
    symbol, frequency, place = _slots(frequency_MKA.flatten(0, 1))
    # A damaged lane may ask for more words than there are, but never for more than one a step.
    word = torch.cat([streams.word_W, streams.word_W.new_zeros(steps + 1)])
    end_L = streams.length_L.cumsum(0).int()
    state_L, next_L = streams.state_L.int(), end_L - streams.length_L.int()
    slot_SL = torch.empty((steps, len(state_L)), dtype=torch.int32, device=state_L.device)
    first_IL = _first_slots(table_MI, frequency_MKA.shape[1])
    if len(table_MI) > 1:
        first_IL = first_IL.repeat_interleave(len(state_L) // len(table_MI), 1)
    arrays = (first_IL, frequency, place, word, state_L, next_L)
    if slot_SL.is_cuda:
        state_L, next_L = _run(slot_SL, *arrays)
    else:
        # An operation on a few numbers takes numpy a fifth of torch's time.
        state, following = _run(slot_SL.numpy(), *(array.numpy() for array in arrays))
        state_L, next_L = torch.from_numpy(state), torch.from_numpy(following)
    if not (torch.equal(state_L, torch.full_like(state_L, LOW)) and torch.equal(next_L, end_L)):
        return None
    return symbol[slot_SL]


def _run(
    slot_SL: Any, first_IL: Any, frequency: Any, place: Any, word: Any, state_L: Any, next_L: Any
) -> tuple[Any, Any]:
    """Fills in the slot that each lane takes in each step; final states and places. Torch tensors or numpy arrays."""
    columns = len(first_IL)
    for step in range(len(slot_SL)):
        slot_L = (state_L & (TOTAL - 1)) + first_IL[step % columns]
        slot_SL[step] = slot_L
        state_L = frequency[slot_L] * (state_L >> _PRECISION) + place[slot_L]
        empty_L = state_L < LOW
        # Where it is empty: state * 2^16 + word.
        state_L = state_L + empty_L * (state_L * 0xFFFF + word[next_L])
        next_L = next_L + empty_L
    return state_L, next_L


def _first_slots(table_MI: Tensor, tables: int) -> Tensor:
    """Where the 4096 slots of each column's table begin, int32 [I, M]."""
    first_M1 = torch.arange(len(table_MI), device=table_MI.device)[:, None] * tables
    return ((first_M1 + table_MI) * TOTAL).int().T.contiguous()


def _slots(frequency_KA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every slot of every table: its symbol (uint8), that symbol's frequency, the slot's place in it (int32)."""
    tables, symbols = frequency_KA.shape
    device, frequency = frequency_KA.device, frequency_KA.flatten()
    start = (frequency_KA.cumsum(1) - frequency_KA).flatten()
    symbol = torch.arange(symbols, device=device, dtype=torch.uint8).repeat(tables).repeat_interleave(frequency)
    place = torch.arange(TOTAL, device=device).repeat(tables) - start.repeat_interleave(frequency)
    return symbol, frequency.repeat_interleave(frequency).int(), place.int()
