"""All down projections of a layer solved together at any size, by conjugate gradients on products with its features.

    min over Delta of sum_t w_t ||y_t - (A (W0 + Delta))_t||^2 + lambda ||Delta||^2,  lambda = c * trace(A^T A) / N

A [T, N] the gated intermediates of all new experts, W0 [N, D] their stacked down projections, Y [T, D] the wanted
output. Callers leave w_t = 1: weighting by 1 / |residual|^2 did not pay on a model with massive activations, see
docs/measurements/reduction.md.

Nothing of size N x N exists: memory is, beside what the problem's rows take, N x D for the right-hand side,
4 N x (outputs of a slab) while a slab is solved, and 2 N x (columns of a preconditioner block). A pass over the rows
costs 4 T K F D operations.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.methods.conjugate import (
    BlockGrams,
    FeatureProblem,
    FeatureRows,
    GramProduct,
    conjugate_gradients,
    solve_roughly,
)

RIDGES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Candidates for c."""
ITERATIONS = 20
SKETCH = 64
"""Outputs that a search looks at: random combinations of all D, so that no single one with large values decides."""
_GAIN = 1e-3
_TIE = 2e-3
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

    Attributes:
        held_out_energy: sum w ||Y||^2 of the held-out tokens.
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
        self._train, self._held = (GramProduct(problem, held_out, start_ND) for held_out in (False, True))
        self._held_out: list[Tensor] = []
        self.held_out_energy = self._before = 0.0
        for part in problem.rows(True):
            target_TD = part.target()
            residual_TD = self._add(part, target_TD)
            self.held_out_energy += part.energy(target_TD)
            self._before += part.energy(residual_TD)
            self._held_out.append(self._sketched(residual_TD))
        self._unit = self._grams.trace / max(1, columns)
        self._held_NC = self._sketched(self._cross_ND) - self._train_NC
        self._sketched_before = sum(
            part.energy(residual_TC) for part, residual_TC in zip(problem.rows(True), self._held_out, strict=True)
        )

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
        before = self._before / max(self.held_out_energy, torch.finfo(torch.float64).tiny)
        none = RidgeSearch(ridge=None, iterations=0, held_out_before=before, held_out_after=before, curves={})
        start = self._error(None)
        if self._unit <= 0 or start <= 0:
            return none
        curves: dict[float, tuple[float, ...]] = {}

        def least(ridge: float) -> float:
            if ridge not in curves:
                curves[ridge] = self._curve(ridge)
            return min(curves[ridge])

        _downhill(least, ridges)
        found = _largest_of_the_best(curves)
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
            return self._train(matrix_NC).add_(matrix_NC, alpha=damping)

        errors: list[float] = []
        steps = conjugate_gradients(product, factors.solve, self._train_NC)
        for solution_NC in itertools.islice(steps, self._bounds.iterations):
            errors.append(self._error(solution_NC))
            previous = errors[-2] if len(errors) > 1 else math.inf
            if errors[-1] > previous * (1 - _GAIN):
                break
        return tuple(errors) or (math.inf,)

    def _error(self, solution_NC: Tensor | None) -> float:
        """sum w ||R - A Delta||^2 over the held-out tokens, for the sketched outputs; None stands for Delta = 0."""
        if solution_NC is None:
            return self._sketched_before
        if self._held.summed:
            curved_NC = self._held(solution_NC) - 2 * self._held_NC
            return self._sketched_before + (solution_NC * curved_NC).sum(dtype=torch.float64).item()
        pairs = zip(self._problem.rows(True), self._held_out, strict=True)
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
            return self._train(matrix_ND).add_(self._held(matrix_ND)).add_(matrix_ND, alpha=damping)

        result_ND = self._cross_ND
        slab = self._bounds.slab(len(result_ND), result_ND.element_size())
        for start in range(0, result_ND.shape[1], slab):
            outputs = slice(start, start + slab)
            wanted_NC = result_ND[:, outputs].contiguous()
            solved_NC = solve_roughly(product, factors.solve, wanted_NC, search.iterations)
            result_ND[:, outputs] = self._start_ND[:, outputs] + solved_NC
        return JointRefit(down_ND=result_ND, search=search)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How close what a layer adds, A W, is to what it should add, Y.

    Attributes:
        error: ||Y - A W|| / ||Y|| (Frobenius).
        cosine: <Y, A W> / (||Y|| ||A W||).
    """

    error: float
    cosine: float


def agreement(rows: Iterable[FeatureRows], down_ND: Float[Tensor, "N D"]) -> Agreement:
    """Of some rows and down projections; sums in fp64."""
    wanted = given = inner = missing = 0.0
    for part in rows:
        target_TD, added_TD = part.target(), part.times(down_ND)
        wanted += part.energy(target_TD)
        given += part.energy(added_TD)
        missing += part.energy(target_TD - added_TD)
        inner += (part.weighted(target_TD).double() * added_TD.double()).sum().item()
    tiny = torch.finfo(torch.float64).tiny
    return Agreement(error=(missing / max(wanted, tiny)) ** 0.5, cosine=inner / max((wanted * given) ** 0.5, tiny))


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


def _downhill(error_of: Callable[[float], float], ridges: Sequence[float]) -> None:
    """From the middle of the ascending ridges to where the error falls no further on either side."""

    def at(place: int) -> float:
        return error_of(ridges[place]) if 0 <= place < len(ridges) else math.inf

    place = (len(ridges) - 1) // 2
    step = -1 if at(place - 1) < at(place) else 1
    while at(place + step) < at(place):
        place += step


def _largest_of_the_best(curves: Mapping[float, Sequence[float]]) -> float:
    """The largest ridge whose error is within a few thousandths of the least: rounding alone seldom changes it."""
    bound = min(min(curve) for curve in curves.values()) * (1 + _TIE)
    return max(ridge for ridge, curve in curves.items() if min(curve) <= bound)
