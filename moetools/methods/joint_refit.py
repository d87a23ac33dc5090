"""All down projections of a layer solved together at any size, by conjugate gradients on products with its features.

    min over Delta of sum_t w_t ||y_t - (A (W0 + Delta))_t||^2 + lambda ||Delta||^2,  lambda = c * trace(A^T A) / N

A [T, N] the gated intermediates of all new experts, W0 [N, D] their stacked down projections, Y [T, D] the wanted
output. The same minimum as `methods.refit.refit_down`, without anything of size N x N: memory is, beside what the problem's
rows take, N x D for the right-hand side, four times N x (columns of a slab) while a slab of outputs is solved, and two
blocks of `block_width` columns per column of A.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.methods.conjugate import (
    BlockGrams,
    FeatureProblem,
    FeatureRows,
    conjugate_gradients,
    gram_product,
)

RIDGES = (3e-4, 3e-3, 3e-2, 0.3, 3.0, 30.0)
"""Where the search for c looks first; see `_refined`."""
ITERATIONS = 20
SKETCH = 256
"""Outputs that a search looks at: random combinations of all D, so that no single one with large values decides."""
_GAIN = 1e-3
_SEED = 20_717


@dataclass(frozen=True, kw_only=True)
class RefitBounds:
    """What a refit may take.

    Attributes:
        iterations: of conjugate gradients at most; a search stops where the held-out error falls no further.
        nbytes: for preconditioner blocks, and again for the arrays of one slab of outputs.
        sketch: outputs a search looks at.
    """

    iterations: int = ITERATIONS
    nbytes: int = 2**30
    sketch: int = SKETCH

    def block_width(self, columns: int, itemsize: int) -> int:
        """Columns of a preconditioner block: its Gram and its factor fit `nbytes`."""
        return max(1, self.nbytes // (2 * itemsize * max(1, columns)))

    def slab(self, columns: int, itemsize: int) -> int:
        """Outputs solved at once: solution, residual, direction and product fit `nbytes`."""
        return max(1, self.nbytes // (4 * itemsize * max(1, columns)))


@dataclass(frozen=True, kw_only=True)
class RidgeSearch:
    """What held-out tokens say about a layer's refit before it is finished.

    Attributes:
        ridge: the chosen c, or None if no ridge improves on W0.
        iterations: after how many the held-out error was least (the fewest within a thousandth of that).
        held_out_before, held_out_after: sum w ||Y - A W||^2 / sum w ||Y||^2 on the held-out tokens.
        curves: by ridge tried, the held-out error after each iteration.
    """

    ridge: float | None
    iterations: int
    held_out_before: float
    held_out_after: float
    curves: dict[float, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class JointRefit:
    """New down projections [N, D], and the search that led to them."""

    down_ND: Float[Tensor, "N D"]
    search: RidgeSearch


class JointSolver:
    """One layer's joint refit: right-hand sides and preconditioner are computed once, for the search and the end.

    Args:
        start_ND: W0.
    """

    def __init__(self, problem: FeatureProblem, start_ND: Float[Tensor, "N D"], bounds: RefitBounds) -> None:
        self._problem, self._start_ND, self._bounds = problem, start_ND, bounds
        columns = len(start_ND)
        self._sketch_DC = sketch_of(start_ND, bounds.sketch)
        self._cross_ND = torch.zeros_like(start_ND)
        self._grams = BlockGrams(problem.widths, bounds.block_width(columns, start_ND.element_size()), start_ND)
        for part in problem.rows(False):
            self._add(part, part.target())
        self._train_NC, self._train_trace = self._sketched(self._cross_ND).clone(), self._grams.trace
        self._held_out: list[Tensor] = []
        self._wanted = self._before = 0.0
        for part in problem.rows(True):
            target_TD = part.target()
            residual_TD = self._add(part, target_TD)
            self._wanted += part.energy(target_TD)
            self._before += part.energy(residual_TD)
            self._held_out.append(self._sketched(residual_TD))
        self._unit = self._grams.trace / max(1, columns)

    def _add(self, part: FeatureRows, target_TD: Tensor) -> Float[Tensor, "T D"]:
        """The residual Y - A W0 of some tokens, whose sums are added up."""
        residual_TD = target_TD - part.times(self._start_ND)
        part.add_transposed(residual_TD, self._cross_ND)
        self._grams.add(part)
        return residual_TD

    def _sketched(self, values: Tensor) -> Tensor:
        return values if self._sketch_DC is None else values @ self._sketch_DC

    def search(self, ridges: Sequence[float] = RIDGES) -> RidgeSearch:
        """Try ridges from the middle downhill, a few iterations each."""
        before = self._before / max(self._wanted, torch.finfo(torch.float64).tiny)
        none = RidgeSearch(ridge=None, iterations=0, held_out_before=before, held_out_after=before, curves={})
        start = self._error(None)
        if self._unit <= 0 or start <= 0:
            return none
        curves: dict[float, tuple[float, ...]] = {}

        def least(ridge: float) -> float:
            if ridge not in curves:
                curves[ridge] = self._curve(ridge)
            return min(curves[ridge])

        found = min((_downhill(least, ridges), _refined(least, sorted(curves))), key=least)
        relative = {ridge: tuple(before * error / start for error in curve) for ridge, curve in curves.items()}
        if not least(found) < start:
            return replace(none, curves=relative)
        return RidgeSearch(
            ridge=found,
            iterations=_fewest(curves[found]),
            held_out_before=before,
            held_out_after=min(relative[found]),
            curves=relative,
        )

    def _curve(self, ridge: float) -> tuple[float, ...]:
        """Held-out errors after each iteration on the training tokens, until they no longer fall by a thousandth."""
        # M of all tokens serves the training tokens too: a common factor of M changes nothing.
        factors = self._grams.factored(ridge * self._unit)
        damping = ridge * self._train_trace / len(self._start_ND)

        def product(matrix_NC: Tensor) -> Tensor:
            return gram_product(self._problem.rows(False), matrix_NC).add_(matrix_NC, alpha=damping)

        errors: list[float] = []
        steps = conjugate_gradients(product, factors.solve, self._train_NC)
        for _, solution_NC in zip(range(self._bounds.iterations), steps, strict=False):
            errors.append(self._error(solution_NC))
            previous = errors[-2] if len(errors) > 1 else math.inf
            if errors[-1] > previous * (1 - _GAIN):
                break
        return tuple(errors) or (math.inf,)

    def _error(self, solution_NC: Tensor | None) -> float:
        """sum w ||R - A Delta||^2 over the held-out tokens, for the sketched outputs; None stands for Delta = 0."""
        pairs = zip(self._problem.rows(True), self._held_out, strict=True)
        if solution_NC is None:
            return sum(part.energy(residual_TC) for part, residual_TC in pairs)
        return sum(part.energy(residual_TC - part.times(solution_NC)) for part, residual_TC in pairs)

    def finish(self, search: RidgeSearch) -> JointRefit:
        """Solve on all tokens, held-out ones too, with the ridge and the number of iterations that the search found.

        The right-hand side is used up: this is the solver's last call.
        """
        if search.ridge is None:
            return JointRefit(down_ND=self._start_ND, search=search)
        damping = search.ridge * self._unit
        factors = self._grams.factored(damping)

        def product(matrix_ND: Tensor) -> Tensor:
            rows = itertools.chain(self._problem.rows(False), self._problem.rows(True))
            return gram_product(rows, matrix_ND).add_(matrix_ND, alpha=damping)

        result_ND = self._cross_ND
        slab = self._bounds.slab(len(result_ND), result_ND.element_size())
        for start in range(0, result_ND.shape[1], slab):
            outputs = slice(start, start + slab)
            wanted_NC = result_ND[:, outputs].contiguous()
            steps = conjugate_gradients(product, factors.solve, wanted_NC)
            for _, solution_NC in zip(range(search.iterations), steps, strict=False):
                result_ND[:, outputs] = solution_NC
            result_ND[:, outputs] += self._start_ND[:, outputs]
        return JointRefit(down_ND=result_ND, search=search)


def sketch_of(like: Float[Tensor, "N D"], outputs: int) -> Float[Tensor, "D C"] | None:
    """Gaussian combinations of the outputs: ||E S||_F^2 is ||E||_F^2 on average over S. The same in every run.

    None where there are no more than `outputs` of them.
    """
    if like.shape[1] <= outputs:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    return (torch.randn(like.shape[1], outputs, generator=generator) / outputs**0.5).to(like)


def _fewest(errors: Sequence[float]) -> int:
    """The first iteration whose error is within a thousandth of the least."""
    bound = min(errors) * (1 + _GAIN)
    return next(place for place, error in enumerate(errors, start=1) if error <= bound)


def _downhill(error_of: Callable[[float], float], ridges: Sequence[float]) -> float:
    """From the middle of the ascending ridges to where the error falls no further on either side."""

    def at(place: int) -> float:
        return error_of(ridges[place]) if 0 <= place < len(ridges) else math.inf

    place = (len(ridges) - 1) // 2
    step = -1 if at(place - 1) < at(place) else 1
    while at(place + step) < at(place):
        place += step
    return ridges[place]


def _refined(error_of: Callable[[float], float], ridges: Sequence[float]) -> float:
    """Where the parabola over log(ridge) through the best of the ascending ridges and its neighbours is least.

    It moves smoothly with the errors: rounding moves the choice a little instead of to another candidate. The best
    ridge itself where it has one neighbour only.
    """
    best = min(range(len(ridges)), key=lambda place: error_of(ridges[place]))
    if not 0 < best < len(ridges) - 1:
        return ridges[best]
    x0, x1, x2 = (math.log(ridge) for ridge in ridges[best - 1 : best + 2])
    y0, y1, y2 = (error_of(ridge) for ridge in ridges[best - 1 : best + 2])
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if left == right:
        return ridges[best]
    vertex = x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)
    return math.exp(min(max(vertex, x0), x2))
