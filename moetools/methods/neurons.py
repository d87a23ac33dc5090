"""Choose a merged expert's neurons among all its members', by what the layer's output loses without each."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moetools.methods.conjugate import BlockGrams, FeatureProblem, FeatureRows, GramProduct, solve_roughly
from moetools.methods.joint_refit import RefitBounds, sketch_of

_ROUNDS = 6
_RIDGE = 1e-2
_FIRST, _NEXT = 6, 2
_SKETCH = 256
"""More than a search looks at: every column's loss counts for itself here."""


def choose_neurons(
    problem: FeatureProblem, quota: int, bounds: RefitBounds, *, rounds: int = _ROUNDS, ridge: float = _RIDGE
) -> list[Int[Tensor, "F"]]:
    """Keep `quota` columns of every expert such that the best refit of what is left loses little.

    The least-squares error grows by exactly ||w_j||^2 / [H^-1]_jj when column j alone is taken out and all others are
    solved again, where H = A^T A + lambda I and W = H^-1 A^T Y (Optimal Brain Surgeon, Hassibi & Stork 1993, for a
    linear layer with many outputs). Columns go in `rounds` rounds, those with the smallest loss first, and both are
    computed anew in between. W is that of all experts together, by a few conjugate gradients that go on from the round
    before, for sketched outputs (||w_j||^2 is a sum over outputs, which the sketch keeps on average). [H^-1]_jj is
    taken inside an expert, or inside a part of it where its block exceeds `bounds`, as if the others' features were
    orthogonal. On one expert, and with one column a round, the choice of the last one is exact.

    Args:
        problem: of the union of all members' neurons, one wide expert per new expert; all of its rows are used.

    Returns:
        Per expert, the chosen columns counted inside it, ascending; all of an expert with no more than `quota`.
    """
    if all(width <= quota for width in problem.widths):
        return [torch.arange(width) for width in problem.widths]
    selection = _Selection(problem, bounds, ridge)
    for step in range(1, rounds + 1):
        losses = selection.losses(_FIRST if step == 1 else _NEXT)
        selection.keep([_best(loss, _left(len(loss), quota, step / rounds)) for loss in losses])
    return [kept.nonzero().flatten().cpu() for kept in selection.kept_N.split(list(problem.widths))]


def _left(width: int, quota: int, progress: float) -> int:
    """Columns left after a share of the rounds: they fall geometrically from `width` to `quota`."""
    return width if width <= quota else max(quota, round(width * (quota / width) ** progress))


def _best(loss_W: Tensor, count: int) -> Bool[Tensor, "W"]:
    """Columns with the largest losses; among equals the first."""
    kept = torch.zeros_like(loss_W, dtype=torch.bool)
    kept[torch.argsort(loss_W, descending=True, stable=True)[:count]] = True
    return kept


class _Selection:
    """Which columns are left, and the solution with them."""

    def __init__(self, problem: FeatureProblem, bounds: RefitBounds, ridge: float) -> None:
        self._problem, self._ridge = problem, ridge
        columns = sum(problem.widths)
        grams: BlockGrams | None = None
        for part in itertools.chain(problem.rows(False), problem.rows(True)):
            target_TD = part.target()
            if grams is None:
                sketch_DC = sketch_of(target_TD, _SKETCH)
                width = bounds.block_width(columns, target_TD.element_size())
                grams = BlockGrams(problem.widths, width, target_TD)
                self._cross_NC = target_TD.new_zeros(columns, min(_SKETCH, target_TD.shape[1]))
            grams.add(part)
            part.add_transposed(target_TD if sketch_DC is None else target_TD @ sketch_DC, self._cross_NC)
        assert grams is not None, "a problem has rows"
        self._grams = grams
        self._products = [GramProduct(problem, held_out, self._cross_NC) for held_out in (False, True)]
        self._solution_NC = torch.zeros_like(self._cross_NC)
        self.kept_N = torch.ones(columns, dtype=torch.bool, device=self._cross_NC.device)

    def keep(self, kept: Sequence[Bool[Tensor, "_"]]) -> None:
        self.kept_N &= torch.cat(list(kept))
        self._solution_NC *= self.kept_N[:, None]

    def losses(self, iterations: int) -> tuple[Float[Tensor, "_"], ...]:
        """By expert, what taking out each column would cost; -1 for those that are out already."""
        kept_N1 = self.kept_N[:, None]
        damping = self._ridge * self._grams.mean_energy(self.kept_N)
        inverses = list(self._grams.inverses(self.kept_N, damping))

        def product(matrix_NC: Tensor) -> Tensor:
            total_NC = self._products[0](matrix_NC).add_(self._products[1](matrix_NC))
            return total_NC.mul_(kept_N1).add_(matrix_NC, alpha=damping)

        def precondition(matrix_NC: Tensor) -> Tensor:
            result_NC = torch.zeros_like(matrix_NC)
            for columns, inverse in inverses:
                result_NC[columns] = inverse @ matrix_NC[columns]
            return result_NC

        missing_NC = (self._cross_NC * kept_N1).sub_(product(self._solution_NC))
        self._solution_NC += solve_roughly(product, precondition, missing_NC, iterations)
        loss_N = torch.full_like(self._solution_NC[:, 0], -1.0)
        for columns, inverse in inverses:
            loss_N[columns] = self._solution_NC[columns].square().sum(1) / inverse.diagonal()
        return loss_N.split(list(self._problem.widths))


def explained(rows: Iterable[FeatureRows], columns: int) -> Float[Tensor, "N"]:
    """What each column alone would explain of the target, ||a_j^T Y||^2 / ||a_j||^2; zero for one without features."""
    cross_ND: Tensor | None = None
    for part in rows:
        target_TD = part.target()
        if cross_ND is None:
            cross_ND = target_TD.new_zeros(columns, target_TD.shape[1])
            energy_N = target_TD.new_zeros(columns)
        part.add_transposed(target_TD, cross_ND)
        energy_N += torch.cat([features_SW.square().sum(0) for features_SW in part.features])
    assert cross_ND is not None, "a problem has rows"
    return cross_ND.square().sum(1) / energy_N.clamp_min(torch.finfo(energy_N.dtype).tiny)
