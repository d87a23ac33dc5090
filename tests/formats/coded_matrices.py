"""Random entropy-coded matrices, whole and damaged, and what the reference decoder says of them."""

from dataclasses import replace

import numpy as np
import torch

from moetools.formats.entropy import coder
from moetools.formats.entropy.bank import Bank
from moetools.formats.entropy.chunks import ChunkedMatrix
from moetools.grids.entropy import EntropyGrid


def random_matrix(generator: np.random.Generator, *, rows: int, columns: int, highest: int, tables: int, steps: int,
                  rate: float) -> tuple[ChunkedMatrix, torch.Tensor]:  # fmt: skip
    """A coded matrix and its codes [O, I]; `rate` is how wide its codes lie, from nearly all zeros to all alike."""
    value_A = np.arange(-highest, highest + 1)
    width_K = rate * highest * generator.random(tables) + 0.05
    share_KA = np.exp(-np.abs(value_A) / width_K[:, None])
    frequency_KA = np.maximum(1, share_KA / share_KA.sum(1, keepdims=True) * (coder.TOTAL - 260)).astype(np.int64)
    frequency_KA[:, highest] += coder.TOTAL - frequency_KA.sum(1)
    table_I = generator.integers(0, tables, columns)
    end_KA = frequency_KA.cumsum(1)
    slot_OI = generator.integers(0, coder.TOTAL, (rows, columns))
    symbol_OI = (end_KA[table_I][None] <= slot_OI[:, :, None]).sum(2)
    symbol_N = torch.from_numpy(symbol_OI.astype(np.uint8)).flatten()
    tables_KA, of_column = torch.from_numpy(frequency_KA), torch.from_numpy(table_I)
    matrix = ChunkedMatrix(
        name="m",
        grid=EntropyGrid(),
        rows=rows,
        columns=columns,
        steps=steps,
        step_I=torch.ones(columns),
        table_I=of_column,
        frequency_KA=tables_KA,
        code=coder.encode(symbol_N, of_column, tables_KA, steps),
    )
    return matrix, torch.from_numpy(symbol_OI - highest).to(torch.int8)


def any_matrix(generator: np.random.Generator) -> tuple[ChunkedMatrix, torch.Tensor]:
    """One of any shape, rate, alphabet and length of chunks."""
    return random_matrix(
        generator,
        rows=int(generator.integers(1, 30)),
        columns=int(generator.integers(1, 90)),
        highest=int(generator.choice([1, 2, 5, 40, 127])),
        tables=int(generator.integers(1, 6)),
        steps=int(generator.integers(1, 40)),
        rate=float(generator.random() ** 3),
    )


def damaged(generator: np.random.Generator, matrix: ChunkedMatrix) -> ChunkedMatrix:
    """The same with another word, state, length of a chunk, or tables."""
    code = matrix.code
    kind = generator.integers(0, 5)
    if kind == 0 and len(code.word_W):
        word_W = code.word_W.clone()
        word_W[generator.integers(len(word_W))] ^= int(1 << generator.integers(15))
        return replace(matrix, code=replace(code, word_W=word_W))
    if kind == 1 and len(code.length_C) > 1:
        length_C = code.length_C.clone()
        giving, taking = generator.permutation(len(length_C))[:2]
        moved = int(generator.integers(0, int(length_C[giving]) + 1))
        length_C[giving] -= moved
        length_C[taking] += moved
        return replace(matrix, code=replace(code, length_C=length_C))
    if kind == 2:
        frequency_KA = matrix.frequency_KA.flip(0) if len(matrix.frequency_KA) > 1 else matrix.frequency_KA.clone()
        highest = frequency_KA.shape[1] // 2
        frequency_KA[:, highest] += frequency_KA[:, -1]
        frequency_KA[:, -1] = 0
        return replace(matrix, frequency_KA=frequency_KA)
    if kind == 3:
        # Words that say nothing of these weights.
        word_W = torch.from_numpy(generator.integers(-(2**15), 2**15, len(code.word_W)).astype(np.int16))
        return replace(matrix, code=replace(code, word_W=word_W))
    state_CL = code.state_CL.clone()
    place = tuple(int(generator.integers(size)) for size in state_CL.shape)
    state_CL[place] = int(generator.integers(coder.LOW, 2**31))
    return replace(matrix, code=replace(code, state_CL=state_CL))


def reference(matrix: ChunkedMatrix) -> torch.Tensor | None:
    """Codes, int8 [N]; None if the code is damaged."""
    count = matrix.rows * matrix.columns
    symbol_N = coder.decode_slowly(matrix.code, count, matrix.table_I, matrix.frequency_KA, matrix.steps)
    return None if symbol_N is None else (symbol_N.int() - matrix.frequency_KA.shape[1] // 2).to(torch.int8)


def agree(decoder: object, matrices: list[ChunkedMatrix], chosen: list[int]) -> None:
    """The decoder says of some matrices of a bank what the reference says of each."""
    plan = Bank.join(matrices)._plan(np.array(chosen, dtype=np.int64))
    codes_N, good_C = decoder.decode(plan)  # type: ignore[attr-defined]
    good_C, sizes = good_C.cpu().numpy(), [matrices[number].rows * matrices[number].columns for number in chosen]
    for place, (number, codes) in enumerate(zip(chosen, codes_N.cpu().split(sizes), strict=True)):
        expected = reference(matrices[number])
        assert bool(good_C[plan.matrix_C == place].all()) == (expected is not None)
        assert expected is None or torch.equal(codes, expected)
