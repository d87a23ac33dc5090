"""What the tests compare the matrix-free refit and choice of neurons with: normal equations solved directly.

With A [T, N] the gated intermediates of all new experts side by side (zero where a token is not routed), W [N, D] their
stacked down projections and Y [T, D] the wanted output, everything needed about T tokens is A^T A, A^T Y and ||Y||^2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Candidates for c in lambda = c * mean(diag(A^T A))."""


@dataclass(frozen=True, kw_only=True)
class NormalEquations:
    """Sums over tokens that determine ||Y - A W||^2 for every W.

    Attributes:
        gram_NN: A^T A, fp32 or wider.
        cross_ND: A^T Y.
        energy: ||Y||^2.
    """

    gram_NN: Float[Tensor, "N N"]
    cross_ND: Float[Tensor, "N D"]
    energy: float

    def error(self, down_ND: Float[Tensor, "N D"]) -> float:
        """||Y - A W||_F^2 = ||Y||^2 - 2 <W, A^T Y> + <W, A^T A W>; A^T A W in the Gram's dtype, sums in fp64."""
        down = down_ND.double()
        linear = (down * self.cross_ND.double()).sum().item()
        square = (down * (self.gram_NN @ down.to(self.gram_NN.dtype)).double()).sum().item()
        return self.energy - 2 * linear + square

    def only(self, columns: Int[Tensor, "M"]) -> "NormalEquations":
        """The equations of a model that has only the given columns of A."""
        return replace(self, gram_NN=self.gram_NN[columns][:, columns], cross_ND=self.cross_ND[columns])

    def plus(self, other: "NormalEquations") -> "NormalEquations":
        """The equations of both token sets together."""
        return NormalEquations(
            gram_NN=self.gram_NN + other.gram_NN,
            cross_ND=self.cross_ND + other.cross_ND,
            energy=self.energy + other.energy,
        )


@dataclass(frozen=True, kw_only=True)
class RefitResult:
    """New down projections and how good they are on tokens that were held out.

    Attributes:
        down_ND: the solution, fp32.
        ridge: the chosen c, or None if no ridge solution beat the start.
        held_out_before, held_out_after: ||Y - A W||^2 / ||Y||^2 on the held-out tokens.
    """

    down_ND: Float[Tensor, "N D"]
    ridge: float | None
    held_out_before: float
    held_out_after: float


def refit_down(
    train: NormalEquations, held_out: NormalEquations, start_ND: Float[Tensor, "N D"], ridges: Sequence[float] = RIDGES
) -> RefitResult:
    """min_D ||Y - A (W0 + D)||^2 + lambda ||D||^2, lambda chosen on held-out tokens, then solved on all tokens.

    D = (A^T A + lambda I)^-1 A^T (Y - A W0), lambda = c * mean(diag(A^T A)). D = 0 if no candidate lowers the held-out
    error, so reconstruction never gets worse on tokens that were not used to solve.
    """
    start = start_ND.double()
    residual = train.cross_ND - train.gram_NN @ start.to(train.gram_NN.dtype)
    before = held_out.error(start)
    rough = train.gram_NN.dtype
    errors = _climb(lambda ridge: held_out.error(start + solve_ridge(train.gram_NN, residual, ridge, rough)), ridges)
    best_error, best_ridge = min((error, ridge) for ridge, error in errors.items())
    if not best_error < before:
        best_error, best_ridge = before, None  # type: ignore[assignment]
    scale = max(held_out.energy, torch.finfo(torch.float64).tiny)
    down = start
    if best_ridge is not None:
        every = train.plus(held_out)
        residual = every.cross_ND.double() - (every.gram_NN @ start.to(every.gram_NN.dtype)).double()
        down = start + solve_ridge(every.gram_NN, residual, best_ridge)
    return RefitResult(
        down_ND=down.float(), ridge=best_ridge, held_out_before=before / scale, held_out_after=best_error / scale
    )


def _climb(error_of: Callable[[float], float], ridges: Sequence[float]) -> dict[float, float]:
    """Errors of the ridges tried: from the middle downhill until the next one is no better.

    The held-out error falls and then rises with the ridge, so a few of the candidates find its minimum.
    """
    errors: dict[int, float] = {}

    def error_at(place: int) -> float:
        if place not in errors:
            errors[place] = error_of(ridges[place]) if 0 <= place < len(ridges) else float("inf")
        return errors[place]

    place = len(ridges) // 2
    step = -1 if error_at(place - 1) < error_at(place) else 1
    while error_at(place + step) < error_at(place):
        place += step
    return {ridges[place]: error for place, error in errors.items() if error < float("inf")}


def solve_ridge(
    gram_NN: Tensor, cross_ND: Tensor, ridge: float, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "N D"]:
    """(G + ridge * mean(diag G) I)^-1 C by Cholesky in `dtype`, as fp64; a Gram of zeros gives zeros.

    Where fp32 is too coarse for the matrix, fp64 is used all the same.
    """
    damped = gram_NN.to(dtype, copy=True)
    mean = damped.diagonal().mean()
    if mean <= 0:
        return torch.zeros_like(cross_ND, dtype=torch.float64)
    damped.diagonal().add_(ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed and dtype != torch.float64:
        return solve_ridge(gram_NN, cross_ND, ridge)
    if failed:
        return torch.linalg.lstsq(damped, cross_ND.to(dtype)).solution
    return torch.cholesky_solve(cross_ND.to(dtype), factor).double()


def choose_exactly(
    equations: NormalEquations, sizes: Sequence[int], quota: int, *, rounds: int = 6, ridge: float = 1e-2
) -> list[Tensor]:
    """Keep `quota` columns of A per cluster such that the best refit of what is left loses little.

    The least-squares error grows by exactly ||w_j||^2 / [H^-1]_jj when column j alone is taken out and all others are
    solved again, where H = A^T A + lambda I and W = H^-1 A^T Y (Optimal Brain Surgeon, Hassibi & Stork 1993, for a
    linear layer with many outputs). Columns go in `rounds` rounds, those with the smallest loss first, and H^-1 is
    computed anew in between; a last column stays exact only with one column a round.

    Args:
        equations: of the union of all members' neurons, cluster after cluster.
        sizes: columns of each cluster.
        quota: columns every cluster keeps; a cluster with fewer keeps all.

    Returns:
        Per cluster, the chosen columns counted inside the cluster, ascending.
    """
    starts = [sum(sizes[:cluster]) for cluster in range(len(sizes))]
    alive = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    if all(size <= quota for size in sizes):
        return [columns - start for columns, start in zip(alive, starts, strict=True)]
    for step in range(1, rounds + 1):
        loss = _removal_loss(equations.only(torch.cat(alive).to(equations.gram_NN.device)), ridge).cpu()
        parts = loss.split([len(columns) for columns in alive])
        for cluster, part in enumerate(parts):
            size = sizes[cluster]
            keep = size if size <= quota else max(quota, round(size * (quota / size) ** (step / rounds)))
            best = part.topk(min(keep, len(part))).indices.sort().values
            alive[cluster] = alive[cluster][best]
    return [columns - start for columns, start in zip(alive, starts, strict=True)]


def _removal_loss(equations: NormalEquations, ridge: float) -> Tensor:
    gram = equations.gram_NN.to(torch.float64, copy=True)
    mean = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    gram.diagonal().add_(ridge * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    solution = inverse @ equations.cross_ND.double()
    return solution.square().sum(1) / inverse.diagonal()
