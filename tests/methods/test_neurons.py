"""The choice of neurons against removing each of them, and against the choice from the whole Gram."""

import pytest
import torch
from dense_problem import DenseProblem, RandomProblem
from direct_refit import choose_exactly
from torch import Tensor

from moetools.methods.joint_refit import RefitBounds
from moetools.methods.neurons import choose_neurons, explained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_removed_neuron_is_the_one_whose_loss_is_least() -> None:
    a = normal(60, 6)
    y = a @ normal(6, 5, seed=1) + 0.1 * normal(60, 5, seed=2)
    chosen = choose_neurons(DenseProblem(a, y, [6]), 5, RefitBounds(), rounds=1, ridge=1e-9)[0]
    errors = {}
    for gone in range(6):
        rest = [column for column in range(6) if column != gone]
        errors[gone] = (y - a[:, rest] @ torch.linalg.lstsq(a[:, rest], y).solution).square().sum().item()
    assert chosen.tolist() == [column for column in range(6) if column != min(errors, key=lambda gone: errors[gone])]


def test_duplicated_neurons_go_first_and_quotas_hold_per_expert() -> None:
    a = normal(200, 4)
    y = a @ normal(4, 5, seed=1)
    union = torch.cat((a[:, :2], a[:, :2], a[:, 2:], 1e-6 * a[:, 2:]), 1)
    chosen = choose_neurons(DenseProblem(union, y, [4, 4]), 2, RefitBounds(), rounds=4, ridge=1e-6)
    kept = torch.cat((union[:, chosen[0]], union[:, 4 + chosen[1]]), 1)
    assert [len(columns) for columns in chosen] == [2, 2]
    assert torch.linalg.matrix_rank(kept) == 4
    assert torch.allclose(kept @ torch.linalg.lstsq(kept, y).solution, y, atol=1e-6)


def test_experts_within_the_quota_are_kept_whole() -> None:
    dense = RandomProblem(tokens=60, widths=[3, 5])
    assert [part.tolist() for part in choose_neurons(dense, 5, RefitBounds())] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert [len(part) for part in choose_neurons(dense, 4, RefitBounds())] == [3, 4]


@pytest.mark.parametrize(
    ("bounds", "most"),
    [(RefitBounds(), 1.05), (RefitBounds(nbytes=2 * 8 * 80 * 10), 1.3)],
)
def test_the_refit_of_the_chosen_is_close_to_that_of_the_exact_choice(bounds: RefitBounds, most: float) -> None:
    """With sketched outputs; also with blocks of a third of an expert."""
    dense = RandomProblem(tokens=600, widths=[30, 20, 30], outputs=300)
    dense.y = dense.a @ (dense.true * torch.logspace(0, -2, 80)[normal(80).argsort(), None])
    starts = torch.tensor([0, 30, 50])

    def error(chosen: list[Tensor]) -> float:
        kept = dense.a[:, torch.cat([part + start for part, start in zip(chosen, starts, strict=True)])]
        return (dense.y - kept @ torch.linalg.lstsq(kept, dense.y).solution).square().sum().item()

    both = dense.equations(False).plus(dense.equations(True))
    exact = error(choose_exactly(both, [30, 20, 30], 10))
    arbitrary = error([torch.arange(10)] * 3)
    assert error(choose_neurons(dense, 10, bounds)) < most * exact < 0.5 * arbitrary


def test_explained_is_what_one_column_alone_reduces_the_error_by() -> None:
    dense = RandomProblem(tokens=80, widths=[3, 4])
    found = explained(dense.rows(False), 7)
    a, y = dense.a[~dense.held], dense.y[~dense.held]
    for column in range(7):
        alone = a[:, [column]]
        left = (y - alone @ torch.linalg.lstsq(alone, y).solution).square().sum()
        assert found[column].item() == pytest.approx((y.square().sum() - left).item())
