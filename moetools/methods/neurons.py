"""Choose a merged expert's neurons among all its members', by what the layer's output loses without each."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from moetools.methods.refit import NormalEquations

_ROUNDS = 6
_RIDGE = 1e-2


def choose_neurons(
    equations: NormalEquations, sizes: Sequence[int], quota: int, *, rounds: int = _ROUNDS, ridge: float = _RIDGE
) -> list[Int[Tensor, "F"]]:
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
