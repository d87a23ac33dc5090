"""The coder of the chunked layout: range asymmetric numeral systems with 32 interleaved states, and the decoder that
all others must equal.

The symbols of a matrix, row after row, are cut into chunks of equally many (the last one has what is left). Symbol n
of a chunk is coded by state n mod 32, so that 32 neighbours are decoded together. A state x in [2^15, 2^31) stands for
all its symbols still to come. A symbol that has f of 2048 slots, the first of them c, is coded by
x -> (x div f) * 2048 + x mod f + c and decoded by x -> f * (x div 2048) + x mod 2048 - c; 16 bits leave or enter x
where it would leave its interval. All states of a chunk read from one string of words, in the order of the symbols.
Sources: J. Duda, arXiv 1311.2540 (rANS); F. Giesen, arXiv 1402.3392 (interleaving).

Letters: C chunks, L = 32 lanes, N symbols, I columns (the table changes with the column), K tables, A symbols of the
alphabet, W words of code.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PRECISION = 11
TOTAL = 1 << PRECISION
"""What the frequencies of a table sum to."""
STATE_BITS = 31
LOW = 1 << (STATE_BITS - 16)
"""Smallest state; every lane starts its encoding there and must end its decoding there."""
LANES = 32


@dataclass(frozen=True, kw_only=True)
class Code:
    """The code of one matrix.

    Attributes:
        state_CL: int32 in [2^15, 2^31): what the decoder starts from.
        length_C: int64, words of each chunk.
        word_W: int16 (its bits are those of a uint16), chunk after chunk in reading order.
    """

    state_CL: Tensor
    length_C: Tensor
    word_W: Tensor


def encode(symbol_N: Tensor, table_I: Tensor, frequency_KA: Tensor, steps: int) -> Code:
    """Codes symbols (uint8) in chunks of `32 * steps`, in main memory; symbol n uses table `table_I[n mod I]`.

    Every symbol that occurs must have a frequency of at least 1 in its table; every table sums to 2048.
    """
    width_SX, start_SX = _slots_of_symbols(symbol_N, table_I, frequency_KA, steps)
    state = np.full(width_SX.shape[1], LOW, dtype=np.int64)
    word_SX = np.full(width_SX.shape, -1, dtype=np.int32)
    for width, start, word in zip(width_SX[::-1], start_SX[::-1], word_SX[::-1], strict=True):
        full = state >= width.astype(np.int64) << (STATE_BITS - PRECISION)
        word[full] = state[full] & 0xFFFF
        state >>= full * 16
        quotient, rest = np.divmod(state, width)
        state = (quotient << PRECISION) + rest + start
    word_CSL = word_SX.reshape(len(word_SX), -1, LANES).swapaxes(0, 1)
    written_CSL = word_CSL >= 0
    return Code(
        state_CL=torch.from_numpy(state.astype(np.int32)).view(-1, LANES),
        length_C=torch.from_numpy(written_CSL.sum((1, 2))),
        word_W=torch.from_numpy(word_CSL[written_CSL].astype(np.uint16).view(np.int16)),
    )


def _slots_of_symbols(
    symbol_N: Tensor, table_I: Tensor, frequency_KA: Tensor, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Frequency and first slot of every symbol, int16 [steps, C * 32], the lanes of one chunk side by side.

    Lanes of the last chunk that have no symbol in a step get all slots, which leaves their state as it is.
    """
    symbol, table = symbol_N.cpu().numpy(), table_I.cpu().numpy()
    frequency = frequency_KA.cpu().numpy()
    start = frequency.cumsum(1) - frequency
    chunks = -(-len(symbol) // (steps * LANES)) if len(symbol) else 0
    width_N, start_N = np.full(chunks * steps * LANES, TOTAL, np.int16), np.zeros(chunks * steps * LANES, np.int16)
    place = table[np.arange(len(symbol)) % max(1, len(table))] * frequency.shape[1] + symbol
    width_N[: len(symbol)], start_N[: len(symbol)] = frequency.take(place), start.take(place)

    def by_step(value_N: np.ndarray) -> np.ndarray:
        return value_N.reshape(chunks, steps, LANES).swapaxes(0, 1).reshape(steps, chunks * LANES)

    return by_step(width_N), by_step(start_N)


def decode_slowly(code: Code, symbols: int, table_I: Tensor, frequency_KA: Tensor, steps: int) -> Tensor | None:
    """The first `symbols` symbols, uint8 [N], one after the other as the layout says; None if the code is damaged.

    A chunk must end with all its states where they began and behind its last word. This is what the fast decoders are
    tested against, and too slow for anything else.
    """
    words, tables = (code.word_W.int() & 0xFFFF).tolist(), table_I.tolist()
    frequencies = frequency_KA.tolist()
    starts = (frequency_KA.cumsum(1) - frequency_KA).tolist()
    of_slot = [[symbol for symbol, count in enumerate(row) for _ in range(count)] for row in frequencies]
    found: list[int] = []
    following = 0
    for states, length in zip(code.state_CL.tolist(), code.length_C.tolist(), strict=True):
        place, end = following, following + length
        following = end
        for number in range(min(steps * LANES, symbols - len(found))):
            lane, table = number % LANES, tables[len(found) % len(tables)]
            slot = states[lane] % TOTAL
            symbol = of_slot[table][slot]
            state = frequencies[table][symbol] * (states[lane] // TOTAL) + slot - starts[table][symbol]
            if state < LOW:
                if place == end:
                    return None
                state = state * 2**16 + words[place]
                place += 1
            states[lane] = state
            found.append(symbol)
        if place != end or states != [LOW] * LANES:
            return None
    return torch.tensor(found, dtype=torch.uint8)
