"""Closed-form refit, neuron selection and router fit against dense references."""

import pytest
import torch
from torch import Tensor

from moetools.methods.neurons import choose_neurons
from moetools.methods.refit import RIDGES, NormalEquations, refit_down, solve_ridge
from moetools.methods.router_fit import cluster_logits, fit_router


def equations(a_TN: Tensor, y_TD: Tensor) -> NormalEquations:
    return NormalEquations(gram_NN=a_TN.T @ a_TN, cross_ND=a_TN.T @ y_TD, energy=y_TD.double().square().sum().item())


def problem(tokens: int = 60, columns: int = 8, width: int = 5, noise: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    w = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    return a, w, a @ w + noise * torch.randn(tokens, width, generator=generator, dtype=torch.float64)


def test_error_is_the_squared_distance() -> None:
    a, w, y = problem()
    assert equations(a, y).error(w) == pytest.approx((y - a @ w).square().sum().item())


def test_ridge_solution_equals_the_augmented_least_squares_problem() -> None:
    a, _, y = problem()
    lam = 0.3 * (a.T @ a).diagonal().mean()
    tall = torch.cat((a, lam.sqrt() * torch.eye(8, dtype=torch.float64)))
    wanted = torch.linalg.lstsq(tall, torch.cat((y, torch.zeros(8, 5, dtype=torch.float64)))).solution
    assert torch.allclose(solve_ridge(a.T @ a, a.T @ y, 0.3), wanted)


def test_refit_finds_the_true_weights_and_reports_the_held_out_error() -> None:
    a, w, y = problem(tokens=400, noise=0.01)
    result = refit_down(equations(a[:300], y[:300]), equations(a[300:], y[300:]), torch.zeros_like(w))
    assert torch.allclose(result.down_ND.double(), w, atol=0.02)
    assert result.held_out_before == pytest.approx(1.0)
    assert result.held_out_after < 1e-3


def test_refit_leaves_weights_that_cannot_be_improved() -> None:
    a, w, _ = problem()
    noise = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    train, held = equations(a[:20], (a @ w + 5 * noise)[:20]), equations(a[20:], (a @ w)[20:])
    result = refit_down(train, held, w, ridges=(1e-4,))
    assert result.ridge is None
    assert torch.equal(result.down_ND, w.float())
    assert result.held_out_after == result.held_out_before


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    a, w, y = problem()
    a[:, 3] = 0
    result = refit_down(equations(a[:40], y[:40]), equations(a[40:], y[40:]), w)
    assert torch.allclose(result.down_ND[3].double(), w[3])
    nothing = NormalEquations(gram_NN=torch.zeros(2, 2), cross_ND=torch.zeros(2, 3), energy=0.0)
    assert torch.equal(refit_down(nothing, nothing, torch.ones(2, 3)).down_ND, torch.ones(2, 3))


def test_one_removed_neuron_is_the_one_whose_loss_is_least() -> None:
    a, _, y = problem(columns=6)
    chosen = choose_neurons(equations(a, y), [6], 5, rounds=1, ridge=1e-9)[0]
    errors = {}
    for gone in range(6):
        rest = [column for column in range(6) if column != gone]
        errors[gone] = (y - a[:, rest] @ torch.linalg.lstsq(a[:, rest], y).solution).square().sum().item()
    assert chosen.tolist() == [column for column in range(6) if column != min(errors, key=lambda gone: errors[gone])]


def test_duplicated_neurons_go_first_and_quotas_hold_per_cluster() -> None:
    a, _, y = problem(tokens=200, columns=4, noise=0.0)
    union = torch.cat((a[:, :2], a[:, :2], a[:, 2:], 1e-6 * a[:, 2:]), 1)
    chosen = choose_neurons(equations(union, y), [4, 4], 2, rounds=4, ridge=1e-6)
    kept = torch.cat((union[:, chosen[0]], union[:, 4 + chosen[1]]), 1)
    assert [len(columns) for columns in chosen] == [2, 2]
    assert torch.linalg.matrix_rank(kept) == 4
    assert torch.allclose(kept @ torch.linalg.lstsq(kept, y).solution, y, atol=1e-6)


def test_clusters_within_the_quota_are_kept_whole() -> None:
    a, _, y = problem()
    assert [part.tolist() for part in choose_neurons(equations(a, y), [3, 5], 5)] == [[0, 1, 2], [0, 1, 2, 3, 4]]


def test_cluster_logits_keep_the_softmax_mass() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    clusters = [(0, 3), (1,), (2, 4)]
    grouped = cluster_logits(logits, clusters, "softmax").softmax(1)
    wanted = torch.stack([logits.softmax(1)[:, list(cluster)].sum(1) for cluster in clusters], 1)
    assert torch.allclose(grouped, wanted)
    sigmoid = cluster_logits(logits - 3, clusters, "sigmoid").sigmoid()
    assert torch.allclose(sigmoid[:, 1], (logits - 3)[:, 1].sigmoid())
    assert torch.allclose(sigmoid[:, 0], (logits - 3)[:, [0, 3]].sigmoid().sum(1).clamp(max=1 - 1e-4))


@pytest.mark.parametrize("biased", [False, True])
def test_fitted_rows_of_duplicates_are_exact(biased: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, rows = torch.randn(500, 6, generator=generator), torch.randn(3, 6, generator=generator)
    rows, bias = torch.cat((rows, rows)), torch.randn(3, generator=generator).repeat(2) if biased else None
    logits = hidden @ rows.T + (0 if bias is None else bias)
    clusters = [(0, 3), (1, 4), (2, 5)]
    fitted, new_bias = fit_router(hidden, logits, clusters, rows_ED=rows, bias_E=bias, scoring="softmax")
    assert torch.allclose(fitted, rows[:3], atol=1e-2 if biased else 0.1)
    assert (new_bias is None) == (bias is None)
    if bias is not None:
        assert torch.allclose(new_bias, bias[:3] + torch.log(torch.tensor(2.0)), atol=1e-2)


def test_a_lone_expert_keeps_its_row() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, rows = torch.randn(50, 4, generator=generator), torch.randn(3, 4, generator=generator)
    fitted, _ = fit_router(hidden, hidden @ rows.T, [(0,), (2, 1)], rows_ED=rows, bias_E=None, scoring="softmax")
    assert torch.equal(fitted[0], rows[0])
    assert not torch.equal(fitted[1], rows[2])


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_climbing_finds_the_ridge_an_exhaustive_search_finds(noise: float) -> None:
    a, w, y = problem(tokens=60, columns=20, noise=noise)
    train, held = equations(a[:40], y[:40]), equations(a[40:], y[40:])
    start = torch.zeros_like(w)
    found = refit_down(train, held, start)
    errors = {ridge: held.error(solve_ridge(train.gram_NN, train.cross_ND, ridge)) for ridge in RIDGES}
    assert found.held_out_after == pytest.approx(min(min(errors.values()), held.error(start)) / held.energy)
