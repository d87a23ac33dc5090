"""Uneven budgets against an exhaustive search over all distributions."""

import itertools

import pytest
import torch

from moetools.errors import StatisticsError, UserError
from moetools.methods.budget import expert_mass, spread_budget


def lost(mass, keep, groups):
    """Share of the mass outside the best `keep` experts, equally many per group, sorted out by hand."""
    size, total = len(mass) // groups, sum(mass)
    kept = 0.0
    for group in range(groups):
        kept += sum(sorted(mass[group * size : (group + 1) * size])[-(keep // groups) :])
    return 1 - kept / total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("keep", "least", "groups"), [(4, 2, 1), (6, 2, 1), (2, 2, 1), (8, 3, 1), (4, 2, 2), (6, 4, 2)]
)
def test_no_distribution_loses_less(seed, keep, least, groups):
    generator = torch.Generator().manual_seed(seed)
    masses = {layer: torch.rand(8, generator=generator, dtype=torch.float64) ** (layer + 1) for layer in (0, 2, 5)}
    budget = spread_budget(masses, measure="routed output", keep=keep, least=least, num_groups=groups)
    sizes = range(least, 9, groups)
    options = [chosen for chosen in itertools.product(sizes, repeat=3) if sum(chosen) == 3 * keep]
    errors = {
        chosen: sum(lost(m.tolist(), k, groups) for m, k in zip(masses.values(), chosen, strict=True)) / 3
        for chosen in options
    }
    assert sum(budget.experts.values()) == 3 * keep
    assert budget.lost == pytest.approx(min(errors.values()))
    assert errors[tuple(budget.experts.values())] == pytest.approx(budget.lost)
    assert budget.lost_uniform == pytest.approx(errors[keep, keep, keep])


def test_a_layer_with_few_strong_experts_keeps_fewer():
    strong, flat = torch.tensor([9.0, 8, 0.1, 0.1]), torch.ones(4)
    budget = spread_budget({0: strong, 1: flat}, measure="routed slots", keep=3, least=1)
    assert budget.experts == {0: 2, 1: 4}


def test_the_best_measurement_is_taken(make_statistics):
    statistics = make_statistics()
    statistics["reap"]["weighted_norm"] = torch.arange(16.0).view(2, 8)
    name, mass_E = expert_mass(statistics)
    assert (name, mass_E.tolist()) == ("routed output", (torch.arange(8.0) * 2 + 8).tolist())
    del statistics["reap"]
    name, mass_E = expert_mass(statistics)
    assert (name, mass_E.tolist()) == ("routed slots", statistics["load"]["slots"].sum(0).tolist())
    assert expert_mass({}) is None


def test_impossible_budgets_are_refused():
    with pytest.raises(UserError, match="9 experts per layer"):
        spread_budget({0: torch.ones(8)}, measure="x", keep=9, least=1)
    with pytest.raises(StatisticsError, match=r"layer 4: .* negative or not finite"):
        spread_budget({4: torch.tensor([1.0, float("nan")])}, measure="x", keep=1, least=1)
