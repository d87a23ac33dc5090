"""The matrix-free joint refit against direct solutions on a dense A."""

import pytest
import torch
from dense_problem import RandomProblem
from direct_refit import refit_down, solve_ridge
from torch import Tensor

from moetools.methods import conjugate
from moetools.methods.conjugate import (
    BlockGrams,
    GramProduct,
    column_blocks,
    conjugate_gradients,
)
from moetools.methods.joint_refit import JointSolver, RefitBounds, RidgeSearch, agreement


def given(ridge: float, iterations: int) -> RidgeSearch:
    return RidgeSearch(ridge=ridge, iterations=iterations, held_out_before=1.0, held_out_after=1.0, curves={})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("nbytes", [2**30, 2 * 8 * 60 * 7])
def test_many_iterations_are_the_direct_solution(weighted: bool, nbytes: int) -> None:
    """Whole experts as preconditioner blocks, and blocks of 7 columns with a few outputs at a time."""
    dense = RandomProblem(tokens=300, widths=[20, 20, 20], weighted=weighted)
    both = dense.equations(False).plus(dense.equations(True))
    start = 0.5 * dense.true
    damped = both.gram_NN + 0.01 * both.gram_NN.diagonal().mean() * torch.eye(60)
    wanted = start + torch.linalg.solve(damped, both.cross_ND - both.gram_NN @ start)
    found = JointSolver(dense, start, RefitBounds(iterations=100, nbytes=nbytes)).finish(given(0.01, 100))
    assert torch.allclose(found.down_ND, wanted, atol=1e-8)


@pytest.mark.parametrize(
    ("tokens", "noise", "most"), [(300, 0.05, 1.005), (300, 0.5, 1.005), (60, 0.5, 1.005), (60, 0.05, 1.08)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_default_iterations_reach_the_direct_held_out_error(
    tokens: int, noise: float, most: float, weighted: bool
) -> None:
    """With more tokens than columns and with fewer; few tokens and little noise take more iterations than are made."""
    dense = RandomProblem(tokens=tokens, widths=[30, 30, 20, 40], noise=noise, weighted=weighted)
    train, held = dense.equations(False), dense.equations(True)
    start = 0.5 * dense.true
    direct = refit_down(train, held, start)
    search = JointSolver(dense, start, RefitBounds()).search()
    assert search.held_out_before == pytest.approx(direct.held_out_before, rel=1e-6)
    assert search.held_out_after < most * direct.held_out_after


def test_the_finished_solution_is_as_good_on_new_tokens() -> None:
    dense, fresh = (
        RandomProblem(tokens=300, widths=[20, 20, 20]),
        RandomProblem(tokens=2000, widths=[20, 20, 20], seed=1),
    )
    start = torch.zeros_like(dense.true)
    direct = refit_down(dense.equations(False), dense.equations(True), start)
    solver = JointSolver(dense, start, RefitBounds())
    found = solver.finish(solver.search())

    def error(down: Tensor) -> float:
        return (fresh.a @ (down - dense.true)).square().sum().item()

    assert error(found.down_ND) < 1.05 * error(direct.down_ND.double()) < 0.5 * error(start)


def test_a_start_that_cannot_be_improved_is_kept() -> None:
    dense = RandomProblem(tokens=60, widths=[30, 30], noise=0.0)
    dense.y[~dense.held] += 5 * torch.randn(48, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    solver = JointSolver(dense, dense.true, RefitBounds())
    search = solver.search(ridges=(1e-4,))
    assert search.ridge is None
    assert search.held_out_after == search.held_out_before
    assert torch.equal(solver.finish(search).down_ND, dense.true)


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    dense = RandomProblem(tokens=200, widths=[10, 10, 10])
    dense.a[:, 10:20] = 0
    start = 0.5 * dense.true
    solver = JointSolver(dense, start, RefitBounds())
    found = solver.finish(solver.search())
    assert torch.equal(found.down_ND[10:20], start[10:20])
    assert not torch.allclose(found.down_ND[:10], start[:10])


def test_nothing_routed_changes_nothing() -> None:
    dense = RandomProblem(tokens=50, widths=[5, 5])
    dense.a[:] = 0
    solver = JointSolver(dense, dense.true, RefitBounds())
    assert solver.search().ridge is None


def test_sketched_outputs_choose_nearly_the_same_ridge() -> None:
    dense = RandomProblem(tokens=300, widths=[30, 30], outputs=200, noise=0.5)
    start = torch.zeros_like(dense.true)
    exact = JointSolver(dense, start, RefitBounds()).search()
    sketched = JointSolver(dense, start, RefitBounds(sketch=64)).search()
    assert exact.ridge is not None
    assert sketched.ridge is not None
    assert sketched.held_out_before == pytest.approx(exact.held_out_before)
    assert sketched.held_out_after == pytest.approx(exact.held_out_after, rel=0.1)
    assert abs(torch.log10(torch.tensor(sketched.ridge / exact.ridge))) < 0.3


def test_of_ridges_that_are_as_good_the_largest_is_taken() -> None:
    """One column of noise: the held-out error hardly depends on the ridge as long as it is small."""
    dense = RandomProblem(tokens=3000, widths=[1], noise=0.05)
    search = JointSolver(dense, torch.zeros_like(dense.true), RefitBounds()).search()
    least = {ridge: min(curve) for ridge, curve in search.curves.items()}
    assert search.ridge is not None
    assert search.ridge > min(least, key=lambda ridge: least[ridge])
    assert least[search.ridge] <= 1.002 * min(least.values())


def test_products_and_grams_equal_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = RandomProblem(tokens=100, widths=[9, 5, 9], weighted=True)
    rows, matrix = ~dense.held, torch.randn(23, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert dense.weight is not None
    gram = dense.a[rows].T @ (dense.weight[rows, None] * dense.a[rows])
    for few_columns in (22, 23):
        monkeypatch.setattr(conjugate, "FEW_COLUMNS", few_columns)
        product = GramProduct(dense, False, matrix)
        assert product.summed == (few_columns == 23)
        assert torch.allclose(product(matrix), gram @ matrix)
    grams = BlockGrams(dense.widths, 4, matrix)
    for part in dense.rows(False):
        grams.add(part)
    assert grams.trace == pytest.approx(gram.trace().item())
    blocks = column_blocks(dense.widths, 4)
    assert [block.width for block in blocks] == [3, 3, 3, 2, 3, 3, 3, 3]
    mask = torch.block_diag(*[torch.ones(block.width, block.width, dtype=torch.float64) for block in blocks])
    wanted = torch.linalg.solve(gram * mask + 0.5 * torch.eye(23), matrix)
    assert torch.allclose(grams.factored(0.5).solve(matrix), wanted)


def test_right_hand_sides_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, wanted = root @ root.T + torch.eye(12), torch.randn(12, 3, generator=generator, dtype=torch.float64)
    wanted[:, 1] = 0
    wanted[:, 2] *= 1e9

    def run(columns: Tensor) -> Tensor:
        steps = conjugate_gradients(lambda x: matrix @ x, lambda x: x / matrix.diagonal()[:, None], columns)
        return [step.clone() for _, step in zip(range(5), steps, strict=False)][-1]

    together = run(wanted)
    assert torch.equal(together[:, 1], torch.zeros(12, dtype=torch.float64))
    for column in (0, 2):
        assert torch.allclose(together[:, [column]], run(wanted[:, [column]]))


def test_agreement_is_that_of_the_dense_matrices() -> None:
    dense = RandomProblem(tokens=100, widths=[9, 5], weighted=True)
    down, rows = 0.7 * dense.true, dense.held
    assert dense.weight is not None
    root = dense.weight.sqrt()[rows, None]
    wanted, added = root * dense.y[rows], root * (dense.a[rows] @ down)
    found = agreement(dense.rows(True), down)
    assert found.error == pytest.approx(((wanted - added).norm() / wanted.norm()).item())
    assert found.cosine == pytest.approx(torch.cosine_similarity(wanted.flatten(), added.flatten(), 0).item())


def test_the_direct_solution_equals_the_augmented_least_squares_problem() -> None:
    dense = RandomProblem(tokens=60, widths=[8])
    lam = 0.3 * (dense.a.T @ dense.a).diagonal().mean()
    tall = torch.cat((dense.a, lam.sqrt() * torch.eye(8, dtype=torch.float64)))
    wanted = torch.linalg.lstsq(tall, torch.cat((dense.y, torch.zeros(8, 6, dtype=torch.float64)))).solution
    assert torch.allclose(solve_ridge(dense.a.T @ dense.a, dense.a.T @ dense.y, 0.3), wanted)
