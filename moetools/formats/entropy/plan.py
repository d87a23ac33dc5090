"""What a decoder of chunks is given: where each chunk's words are, where its weights go, and whose tables it uses."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moetools.formats.entropy.coder import TOTAL

SYMBOL_BITS, FREQUENCY_BITS = 8, 11
"""Of a slot: its code (as uint8), one less than that code's frequency, and its place among that code's slots."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Chunks of M matrices, in the order of their weights; numpy arrays are int64 in main memory.

    Attributes:
        bank_tables_M2: first row of the matrix' tables in `frequency_KA`, and the row behind its last.
        matrix_C: number of the chunk's matrix, 0 to M - 1.
        chunk_C: its row of `state_CL`.
        start_C, end_C: its words.
        place_C, count_C: where its weights begin among all, how many they are.
        x_C: where its matrix begins in `table_X`.
        column_C, columns_C: column of its first weight, columns of its matrix.
        weights: of all matrices.
        word_W, state_CL, table_X, frequency_KA: as in `Bank`, on the device that decodes.
    """

    bank_tables_M2: np.ndarray
    matrix_C: np.ndarray
    chunk_C: np.ndarray
    start_C: np.ndarray
    end_C: np.ndarray
    place_C: np.ndarray
    count_C: np.ndarray
    x_C: np.ndarray
    column_C: np.ndarray
    columns_C: np.ndarray
    weights: int
    word_W: Tensor
    state_CL: Tensor
    table_X: Tensor
    frequency_KA: Tensor

    def slots(self) -> tuple[Tensor, np.ndarray]:
        """The 2048 slots of every table of these matrices, int32, one table behind the other; each matrix' first."""
        count_M = self.bank_tables_M2[:, 1] - self.bank_tables_M2[:, 0]
        before_M = count_M.cumsum() - count_M
        row_K = np.arange(count_M.sum()) + (self.bank_tables_M2[:, 0] - before_M).repeat(count_M)
        frequency_KA = self.frequency_KA[torch.from_numpy(row_K).to(self.frequency_KA.device)].int()
        end_KA = frequency_KA.cumsum(1, dtype=torch.int32)
        slot_KS = torch.arange(TOTAL, device=end_KA.device, dtype=torch.int32).expand(len(end_KA), -1).contiguous()
        symbol_KS = torch.searchsorted(end_KA, slot_KS, right=True)
        width_KS, end_KS = frequency_KA.gather(1, symbol_KS), end_KA.gather(1, symbol_KS)
        code_KS = (symbol_KS - frequency_KA.shape[1] // 2) & 255
        place_KS = slot_KS - (end_KS - width_KS)
        packed_KS = code_KS.int() | (width_KS - 1) << SYMBOL_BITS | place_KS << (SYMBOL_BITS + FREQUENCY_BITS)
        return packed_KS.flatten(), before_M * TOTAL
