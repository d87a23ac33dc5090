"""Chunks of many matrices side by side in memory, and their decoding by whatever is fastest here.

Decoders are bit-identical: numba's on a CPU where numba is installed, Triton's on CUDA where Triton is, else one of
plain array operations, which takes one step of all lanes of all chunks at a time.
"""

import functools
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetools.formats.entropy import coder, with_arrays
from moetools.formats.entropy.chunks import ChunkedMatrix
from moetools.formats.entropy.plan import Plan
from moetools.formats.entropy.streams import bad_end
from moetools.grids.entropy import EntropyGrid

_WORTH_COMPILING = 2**17
"""Weights below which numba, which compiles for a second or two when it is first used, is not imported for them."""
_DECODE_WEIGHTS = {"cpu": 2**23}
_DECODE_WEIGHTS_ELSEWHERE = 2**27
"""Weights that are decoded at a time: on a CPU so few that the memory of their codes, a byte each, is used again."""
_DECODE_MATRICES = 2**12


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Matrices as they stay in memory while their weights are not needed.

    Attributes:
        names, grids, shapes: of each matrix; [O, I].
        steps_M: symbols of a lane of its chunks.
        chunk_M, column_M, table_M: its first chunk, its first entry of `table_X`, its first row of `frequency_KA`; one
            more at the end.
        start_C: first word of each chunk; one more at the end.
        word_W: int16, 32 zeros behind the last.
        state_CL: int32.
        table_X: uint8, number of every column's table among those of its matrix; of a matrix its I columns and
            then, again from the first on, 31 more, so that 32 neighbours are always neighbours here.
        frequency_KA: int16; tables of fewer symbols have zeros on both sides.
        step_X: fp32, steps of all columns.
    """

    names: tuple[str, ...]
    grids: tuple[EntropyGrid, ...]
    shapes: tuple[tuple[int, int], ...]
    steps_M: np.ndarray
    chunk_M: np.ndarray
    column_M: np.ndarray
    table_M: np.ndarray
    start_C: np.ndarray
    word_W: Tensor
    state_CL: Tensor
    table_X: Tensor
    frequency_KA: Tensor
    step_X: Tensor

    @staticmethod
    def join(matrices: Sequence[ChunkedMatrix]) -> "Bank":
        """Some matrices, in main memory."""
        highest = max(matrix.frequency_KA.shape[1] // 2 for matrix in matrices)
        guard = torch.zeros(coder.LANES, dtype=torch.int16)
        wide = [_widen(matrix.frequency_KA, highest) for matrix in matrices]
        return Bank(
            names=tuple(matrix.name for matrix in matrices),
            grids=tuple(matrix.grid for matrix in matrices),
            shapes=tuple((matrix.rows, matrix.columns) for matrix in matrices),
            steps_M=np.array([matrix.steps for matrix in matrices]),
            chunk_M=_ends([len(matrix.code.length_C) for matrix in matrices]),
            column_M=_ends([_lasting(matrix.columns) for matrix in matrices]),
            table_M=_ends([len(matrix.frequency_KA) for matrix in matrices]),
            start_C=_ends(torch.cat([matrix.code.length_C for matrix in matrices]).tolist()),
            word_W=torch.cat([*(matrix.code.word_W for matrix in matrices), guard]),
            state_CL=torch.cat([matrix.code.state_CL for matrix in matrices]),
            table_X=torch.cat([_again(matrix.table_I.to(torch.uint8)) for matrix in matrices]),
            frequency_KA=torch.cat(wide).to(torch.int16),
            step_X=torch.cat([_again(matrix.step_I) for matrix in matrices]),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What takes memory, by attribute."""
        names = ("word_W", "state_CL", "table_X", "frequency_KA", "step_X")
        return {name: getattr(self, name) for name in names}

    def on(self, tensors: Mapping[str, Tensor]) -> "Bank":
        """The same with `tensors` elsewhere."""
        changed: dict[str, Any] = dict(tensors)
        return replace(self, **changed)

    def codes(self, numbers: Sequence[int]) -> list[Tensor]:
        """Codes [O, I], int8, of some matrices, decoded together.

        Raises:
            CheckpointError: the code of one is damaged; the message names it.
        """
        found: list[Tensor] = []
        for some in self._shares(numbers):
            plan = self._plan(np.array(some, dtype=np.int64))
            codes_N, good_C = _decoder(plan).decode(plan)
            if not bool(good_C.all()):
                wrong = np.unique(plan.matrix_C[~good_C.cpu().numpy()])
                bad_end([self.names[some[number]] for number in wrong])
            sizes = [self.shapes[number][0] * self.shapes[number][1] for number in some]
            parts = codes_N.split(sizes)
            found += [part.view(self.shapes[number]) for number, part in zip(some, parts, strict=True)]
        return found

    def dense(self, groups: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        """Weights of groups of matrices with equally many columns, the rows of a group's one behind the other [O, I].

        A weight is code times step in fp32, rounded to `dtype`.

        Raises:
            CheckpointError: as `codes`.
        """
        found: list[Tensor] = []
        places: list[tuple[int, Tensor]] = []
        for group in groups:
            rows = [self.shapes[number][0] for number in group]
            size = (sum(rows), self.shapes[group[0]][1])
            found.append(torch.empty(size, dtype=dtype, device=self.word_W.device))
            places += zip(group, found[-1].split(rows), strict=True)
        for some in self._shares(range(len(places))):
            codes = self.codes([places[place][0] for place in some])
            for place, codes_OI in zip(some, codes, strict=True):
                number, result_OI = places[place]
                self._times_step(number, result_OI, codes_OI)
        return found

    def step_I(self, number: int) -> Tensor:
        """Steps of a matrix' columns."""
        first = int(self.column_M[number])
        return self.step_X[first : first + self.shapes[number][1]]

    def _times_step(self, number: int, result_OI: Tensor, codes_OI: Tensor) -> None:
        step_I, on_cpu = self.step_I(number), codes_OI.device.type == "cpu"
        if result_OI.dtype == torch.bfloat16 and on_cpu and (numba := _numba(codes_OI.numel())):
            numba.times_step(codes_OI, step_I, result_OI)
        else:
            result_OI.copy_(codes_OI.float() * step_I)

    def _shares(self, numbers: Sequence[int]) -> list[list[int]]:
        """The same numbers in runs that are small enough to be decoded at a time."""
        shares: list[list[int]] = []
        most = _DECODE_WEIGHTS.get(self.word_W.device.type, _DECODE_WEIGHTS_ELSEWHERE)
        room = 0
        for number in numbers:
            size = self.shapes[number][0] * self.shapes[number][1]
            if not shares or size > room or len(shares[-1]) == _DECODE_MATRICES:
                shares.append([])
                room = most
            shares[-1].append(number)
            room -= size
        return shares

    def _plan(self, number_M: np.ndarray) -> Plan:
        """What is decoded, without a loop over chunks."""
        shape_M2 = np.array([self.shapes[number] for number in number_M], dtype=np.int64).reshape(-1, 2)
        size_M, columns_M = shape_M2.prod(1), shape_M2[:, 1]
        chunks_M = self.chunk_M[number_M + 1] - self.chunk_M[number_M]
        matrix_C = np.arange(len(number_M)).repeat(chunks_M)
        inside_C = np.arange(chunks_M.sum()) - (chunks_M.cumsum() - chunks_M).repeat(chunks_M)
        chunk_C = self.chunk_M[number_M].repeat(chunks_M) + inside_C
        weights_M = self.steps_M[number_M] * coder.LANES
        first_C = inside_C * weights_M.repeat(chunks_M)
        return Plan(
            bank_tables_M2=np.stack([self.table_M[number_M], self.table_M[number_M + 1]], 1),
            matrix_C=matrix_C,
            chunk_C=chunk_C,
            start_C=self.start_C[chunk_C],
            end_C=self.start_C[chunk_C + 1],
            place_C=(size_M.cumsum() - size_M)[matrix_C] + first_C,
            count_C=np.minimum(weights_M[matrix_C], size_M[matrix_C] - first_C),
            x_C=self.column_M[number_M][matrix_C],
            column_C=first_C % columns_M[matrix_C] if len(first_C) else first_C,
            columns_C=columns_M[matrix_C],
            weights=int(size_M.sum()),
            word_W=self.word_W,
            state_CL=self.state_CL,
            table_X=self.table_X,
            frequency_KA=self.frequency_KA,
        )


def _decoder(plan: Plan) -> ModuleType:
    """The module that decodes this plan fastest, of those that can."""
    if plan.word_W.is_cuda:
        return _installed("triton", "with_triton") or with_arrays
    return (_numba(plan.weights) if plan.word_W.device.type == "cpu" else None) or with_arrays


def _numba(weights: int) -> ModuleType | None:
    """The module that numba compiles, if so many weights are worth it."""
    known = "moetools.formats.entropy.with_numba" in sys.modules
    return _installed("numba", "with_numba") if known or weights >= _WORTH_COMPILING else None


@functools.cache
def _installed(package: str, module: str) -> ModuleType | None:
    """Our module on top of an optional package, if there is the package."""
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.import_module(f"moetools.formats.entropy.{module}")


def _ends(counts: Sequence[int]) -> np.ndarray:
    """Where each of some runs begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _lasting(columns: int) -> int:
    return columns + coder.LANES - 1 if columns else 0


def _again(value_I: Tensor) -> Tensor:
    """A matrix' columns and then 31 more, from the first on."""
    return value_I[torch.arange(_lasting(len(value_I))) % max(1, len(value_I))]


def _widen(frequency_KA: Tensor, highest: int) -> Tensor:
    """The same with more magnitudes, which never occur."""
    more = highest - frequency_KA.shape[1] // 2
    return torch.nn.functional.pad(frequency_KA, (more, more))
