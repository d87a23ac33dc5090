"""Integer multiples of a step, meant for an entropy code: any rate, also far below one bit per weight."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from moetools.errors import UserError
from moetools.grids.base import Grid, Params, Quantized

OCTAVE = 4
"""Steps of the columns of a matrix differ by whole powers of 2^(1/OCTAVE)."""
CHUNK_WEIGHTS = 2**16
"""Weights that are decoded together, about: 32 lanes that share a string of words."""
_HEADER_BITS = 8 * 40
_CHUNK_BITS = 32 + 32 * 24
"""What a chunk costs beside its weights: its length, the part of 32 states that says nothing (8 bits of each do)."""
_EXPONENT_BITS = 4
_FREQUENCY_BITS = 11
_TABLE_COUNTS = (1, 2, 4, 8, 16)
_LLOYD_STEPS = 3
_EXPONENT_RANGE = 4 * 12
_SAMPLE_ROWS = 64
_OCTAVES, _SEARCH_STEPS = 24, 10
_TOGETHER = {"cpu": 1 << 18, "cuda": 1 << 27}
"""Codes whose tables are chosen at once: what stays in a CPU's cache, and what keeps a GPU busy."""


@dataclass(frozen=True, kw_only=True)
class EntropyGrid(Grid):
    """value = code * step, with one step per column; codes are int8 in [-levels, levels].

    With an entropy code the price of a matrix is not its widest code but the information in all of them. Then the least
    importance-weighted error at a given number of bits has importance_i * step_i^2 alike for all columns i of all
    matrices (reverse water-filling; T. Cover, J. Thomas, Elements of Information Theory, 10.3.3), so that one number
    decides the steps of any number of matrices.

    Codes are rounded to nearest. Rounding that also weighs the bits of a code (a dead zone around zero) lowers the
    error of a lone matrix at a given rate, yet it made models worse behind GPTQ at every rate tried: at 1 bit the KL
    was .027 without, .034 with half and .043 with the whole of the dead zone that is best for a Gaussian.

    Attributes:
        rate: wanted bits per weight on disk, everything included; 0.05 to 6.
        step: the step of a column of importance 1; None lets `fit` search for the one that meets `rate`.
        step_scale: factor on the step, given or found; `meet_rate` sets it.
        levels: largest magnitude of a code; 1 is ternary.

    Raises:
        UserError: a rate, step or number of levels that does not exist, or groups of columns.
    """

    kind: ClassVar[str] = "entropy"
    prices_codes: ClassVar[bool] = True

    rate: float = 1.0
    step: float | None = None
    step_scale: float = 1.0
    levels: int = 127

    def __post_init__(self) -> None:
        if not 0.05 <= self.rate <= 6:
            raise UserError(f"{self.rate} bits per weight cannot be asked of an entropy code; legal: 0.05 to 6")
        if not 0 < (1.0 if self.step is None else self.step) * self.step_scale < math.inf:
            raise UserError(f"step {self.step} times {self.step_scale} is not a positive number")
        if not 1 <= self.levels <= 127:
            raise UserError(f"{self.levels} levels do not fit a code; legal: 1 to 127")
        if self.group_size is not None:
            raise UserError("an entropy-coded grid has one step per column and no groups", hint="`group_size=0`")

    def group_of_column(self, columns: int, device: torch.device) -> Int[Tensor, "I"]:
        """Every column is a group of its own."""
        return torch.arange(columns, device=device)

    def fit(self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None) -> Params:
        """Step of column i of matrix b: step / sqrt(importance_bi), rounded to step_b0 * 2^(k/4), alike for all rows.

        Importances are compared across the batch, so give sums over the tokens of each matrix and not means: bits then
        go to the matrices and columns that need them. With compensated rounding (GPTQ) the importance is 1 / U_ii^2,
        H^-1 = U^T U in the order of processing: what an error costs after later columns made up for it.

        With `step` None, the step is searched that gives all matrices together `rate` bits per weight when they are
        rounded without compensation.

        Raises:
            UserError: the matrices are so small that the overhead alone is more than `rate`.
        """
        if importance_BI is None:
            importance_BI = torch.ones_like(weight_BOI[:, 0], dtype=torch.float32)
        inverse_BI = _inverse_roots(importance_BI)
        step = self._search(weight_BOI.float(), inverse_BI) if self.step is None else self.step
        return _shared_steps(step * self.step_scale * inverse_BI, weight_BOI.shape[1])

    def encode(self, weight_BOC: Float[Tensor, "B O C"], params_BOC: Params) -> Tensor:
        return (weight_BOC.float() / params_BOC.scale_BOG).round_().clamp_(-self.levels, self.levels).to(torch.int8)

    def decode(self, codes_BOC: Tensor, params_BOC: Params) -> Float[Tensor, "B O C"]:
        return codes_BOC.float() * params_BOC.scale_BOG

    def storage_bits(self, rows: int, columns: int) -> float | int:
        """The wanted rate times the weights."""
        return self.rate * rows * columns

    def _search(self, weight_BOI: Tensor, inverse_BI: Tensor) -> float:
        """The largest step that takes `rate` bits, or the one that takes most: bisection on some of the rows.

        From a step at which every code is zero down, bits grow, until so many codes are cut off at `levels` that they
        fall again.
        """
        batch, rows, columns = weight_BOI.shape
        least = overhead_bits(rows, columns) / (rows * columns)
        if least >= self.rate:
            raise UserError(
                f"{self.rate} bits per weight is less than the overhead of a [{rows}, {columns}] matrix ({least:.2f})",
                hint="entropy coding pays for matrices of tens of thousands of weights and more",
            )
        sample_BRI = weight_BOI[:, :: max(1, rows // _SAMPLE_ROWS)]

        def bits(logarithm: float) -> float:
            codes_BRI = self.encode(sample_BRI, _shared_steps(2**logarithm * inverse_BI, sample_BRI.shape[1]))
            information_B, overhead_B = table_bits(codes_BRI)
            sampled = float(information_B.sum()) / codes_BRI.numel()
            return least + sampled + float(overhead_B.sum()) / (batch * rows * columns)

        high = math.log2(float((sample_BRI / inverse_BI[:, None, :]).abs().max()) or 1.0) + 1
        reached: dict[float, float] = {}
        for octave in range(_OCTAVES):
            reached[high - octave] = bits(high - octave)
            if reached[high - octave] >= self.rate:
                break
        else:
            return 2 ** max(reached, key=lambda logarithm: reached[logarithm])
        low = min(reached)
        high = low + 1
        for _ in range(_SEARCH_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if bits(middle) > self.rate else (low, middle)
        return 2 ** ((low + high) / 2)


@dataclass(frozen=True, kw_only=True)
class ColumnTables:
    """A few tables of how often each magnitude occurs, and the one that each column of a matrix uses.

    Attributes:
        table_I: number of the column's table.
        count_KA: how often the magnitudes 0, 1, ... occur in the columns of each table.
        information: bits of the codes under these tables; a sign takes one bit.
        overhead: bits of the tables themselves and of the columns' choices (an estimate).
    """

    table_I: Int[Tensor, "I"]
    count_KA: Int[Tensor, "K A"]
    information: float
    overhead: int

    @staticmethod
    def fit(codes_OI: Int[Tensor, "O I"]) -> "ColumnTables":
        """1, 2, 4, 8 or 16 tables, whatever makes least bits; columns choose by Lloyd's alternation.

        Columns of large steps are nearly all zeros and others are not: one table for all would cost .1 bit per weight
        and more.
        """
        best = _cheapest(codes_OI[None])
        used, table_I = best.table_BI[0].unique(return_inverse=True)
        return ColumnTables(
            table_I=table_I,
            count_KA=best.count_BKA[0, used].long(),
            information=float(best.information_B),
            overhead=int(best.overhead_B),
        )


def scale_factors(exponent: Int[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """2^(k/4) in fp32 and the same on every device: one of four constants times an exact power of two."""
    constant = torch.tensor([2 ** (part / OCTAVE) for part in range(OCTAVE)], device=exponent.device)
    return torch.ldexp(constant[exponent % OCTAVE], torch.div(exponent, OCTAVE, rounding_mode="floor"))


def overhead_bits(rows: int, columns: int) -> int:
    """Bits beside codes and tables: header, chunks, exponents of the columns (an estimate)."""
    return _HEADER_BITS + chunks_of(rows * columns) * _CHUNK_BITS + columns * _EXPONENT_BITS


def chunks_of(weights: int) -> int:
    """Chunks of a matrix, all of them two thirds of CHUNK_WEIGHTS or more unless there is only one."""
    return max(1, round(weights / CHUNK_WEIGHTS))


def stream_bits(quantized: Quantized) -> Float[Tensor, "B"]:
    """Bits that each matrix takes on disk, everything included: an estimate within about 1 %."""
    fixed = overhead_bits(*quantized.codes_BOI.shape[1:])
    information_B, overhead_B = table_bits(quantized.codes_BOI)
    return (fixed + information_B + overhead_B).cpu()


def table_bits(codes_BOI: Int[Tensor, "B O I"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """`information` and `overhead` of the `ColumnTables` of each matrix, of as many at once as fit."""
    size = max(1, codes_BOI[0].numel()) if len(codes_BOI) else 1
    runs = codes_BOI.split(max(1, _TOGETHER[codes_BOI.device.type] // size))
    found = [_cheapest(run) for run in runs]
    return torch.cat([one.information_B for one in found]), torch.cat([one.overhead_B for one in found])


def meet_rate(
    grid: EntropyGrid, quantize: Callable[[EntropyGrid], Quantized], *, tolerance: float = 0.01, attempts: int = 5
) -> Quantized:
    """What `quantize` makes with the step that meets `grid.rate` over all its matrices, within a share `tolerance`.

    Compensation widens the weights that are still to be rounded, so the rate that `fit` aims at is missed. The step is
    corrected by the secant method on its logarithm, by a factor of four at most; the best of at most `attempts` results
    is returned.
    """
    points: list[tuple[float, float]] = []
    best: tuple[float, Quantized] | None = None
    logarithm = math.log2(grid.step_scale)
    while True:
        quantized = quantize(replace(grid, step_scale=2**logarithm))
        bits = float(stream_bits(quantized).sum()) / quantized.codes_BOI.numel()
        missed = abs(bits - grid.rate)
        if best is None or missed < best[0]:
            best = (missed, quantized)
        points.append((logarithm, bits))
        if missed <= tolerance * grid.rate or len(points) == attempts:
            return best[1]
        logarithm += min(2.0, max(-2.0, (grid.rate - bits) / _slope(points)))


def _slope(points: list[tuple[float, float]]) -> float:
    """Bits per doubling of the step by the last two points, -1/4 at most; -1 to begin with."""
    if len(points) < 2 or points[-1][0] == points[-2][0]:
        return -1.0
    (old_step, old_bits), (step, bits) = points[-2:]
    return min(-0.25, (bits - old_bits) / (step - old_step))


def _inverse_roots(importance_BI: Tensor) -> Float[Tensor, "B I"]:
    """1 / sqrt(importance), at most 2^12 times the smallest of its matrix (of all, if the matrix has no importance)."""
    positive = importance_BI.float().clamp(min=0)
    top_B1 = positive.amax(1, keepdim=True)
    least = torch.where(top_B1 > 0, top_B1, positive.max().clamp(min=1e-30)) * 2.0 ** (-2 * _EXPONENT_RANGE / OCTAVE)
    return torch.maximum(positive, least).rsqrt()


def _shared_steps(step_BI: Tensor, rows: int) -> Params:
    """Steps of all rows, as they will be stored: that of column 0 times a power of 2^(1/4)."""
    first_B1 = step_BI[:, :1]
    exponent_BI = ((step_BI / first_B1).log2() * OCTAVE).round().long()
    rounded_BI = first_B1 * scale_factors(exponent_BI)
    return Params(scale_BOG=rounded_BI[:, None, :].expand(-1, rows, -1))


@dataclass(frozen=True, kw_only=True)
class _Clusters:
    """Tables of B matrices; those that no column uses have counts of 0. See `ColumnTables`."""

    table_BI: Tensor
    count_BKA: Tensor
    information_B: Tensor
    overhead_B: Tensor


def _cheapest(codes_BOI: Tensor) -> _Clusters:
    """The number of tables that costs each matrix least."""
    magnitude_BOI = codes_BOI.abs()
    highest = int(magnitude_BOI.max()) if codes_BOI.numel() else 0
    count_BIA = torch.stack(
        [(magnitude_BOI == value).sum(1, dtype=torch.int32) for value in range(highest + 1)], 2
    ).double()
    some = [_clusters(count_BIA, tables) for tables in _TABLE_COUNTS if tables <= max(1, count_BIA.shape[1])]
    best = torch.stack([one.information_B + one.overhead_B for one in some]).argmin(0)
    most = some[-1].count_BKA.shape[1]

    def chosen(values: list[Tensor]) -> Tensor:
        stacked = torch.stack(values)
        return stacked[best, torch.arange(stacked.shape[1], device=stacked.device)]

    padding = [(0, 0, 0, most - one.count_BKA.shape[1]) for one in some]
    counts = [functional.pad(one.count_BKA, pad) for one, pad in zip(some, padding, strict=True)]
    return _Clusters(
        table_BI=chosen([one.table_BI for one in some]),
        count_BKA=chosen(counts),
        information_B=chosen([one.information_B for one in some]),
        overhead_B=chosen([one.overhead_B for one in some]),
    )


def _clusters(count_BIA: Tensor, tables: int) -> _Clusters:
    """Columns dealt to `tables` tables by their mean magnitude, then to whichever is cheapest, a few times.

    A matrix has as many magnitudes as its largest code needs, whatever the others have.
    """
    batch, columns, magnitudes = count_BIA.shape
    value_A = torch.arange(magnitudes, device=count_BIA.device)
    sign_A = (value_A > 0).double()
    highest_B = (count_BIA.amax(1) * (value_A + 1)).gt(0).long().mul(value_A).amax(1) if columns else value_A[:1]
    there_B1A = (value_A <= highest_B[:, None])[:, None]
    rank_BI = (count_BIA * value_A).sum(2).argsort(1)
    dealt_I = torch.arange(columns, device=count_BIA.device) * tables // max(1, columns)
    table_BI = torch.empty_like(rank_BI).scatter_(1, rank_BI, dealt_I.expand(batch, -1))
    for _ in range(_LLOYD_STEPS if tables > 1 else 0):
        smooth_BKA = _gather_counts(count_BIA, table_BI, tables) + 0.1 * there_B1A
        length_BKA = sign_A - (smooth_BKA / smooth_BKA.sum(2, keepdim=True)).log2()
        table_BI = (count_BIA @ length_BKA.where(there_B1A, 0).mT).argmin(2)
    count_BKA = _gather_counts(count_BIA, table_BI, tables)
    total_BK = count_BKA.sum(2)
    used_B = (total_BK > 0).sum(1).clamp(min=1)
    length_BKA = sign_A - (count_BKA.clamp(min=1) / total_BK.clamp(min=1)[:, :, None]).log2()
    choice_B = columns * used_B.double().log2().ceil()
    return _Clusters(
        table_BI=table_BI,
        count_BKA=count_BKA,
        information_B=(count_BKA * length_BKA).sum((1, 2)),
        overhead_B=choice_B + _FREQUENCY_BITS * used_B * highest_B,
    )


def _gather_counts(count_BIA: Tensor, table_BI: Tensor, tables: int) -> Float[Tensor, "B K A"]:
    counts_BKA = count_BIA.new_zeros((len(count_BIA), tables, count_BIA.shape[2]))
    return counts_BKA.scatter_add_(1, table_BI[:, :, None].expand_as(count_BIA), count_BIA)


GRID = EntropyGrid
