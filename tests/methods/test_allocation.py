"""Bit allocation against enumeration of all choices."""

import itertools

import pytest
import torch

from moetools.errors import UserError
from moetools.methods.allocation import allocate


def enumerated(cost, bits, budget):
    choices = itertools.product(range(cost.shape[1]), repeat=cost.shape[0])
    totals = [
        (sum(bits[i, j].item() for i, j in enumerate(choice)), sum(cost[i, j].item() for i, j in enumerate(choice)))
        for choice in choices
    ]
    return min(total for used, total in totals if used <= budget)


@pytest.mark.parametrize("kind", ["real", "ties", "fine", "convex", "equal"])
def test_least_cost_within_the_budget(kind):
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    for _ in range(150):
        items, options = (int(torch.randint(1, 6, (1,), generator=generator)) for _ in range(2))
        cost = torch.rand(items, options, generator=generator)
        bits = torch.randint(1, 999 if kind == "fine" else 9, (items, options), generator=generator)
        if kind == "ties":
            cost = (4 * cost).round()
        if kind == "convex":
            bits = torch.arange(1, options + 1).expand(items, -1) * 64
            cost = cost[:, :1] * 4.0 ** -torch.arange(options)
        if kind == "equal":
            cost, bits = cost[:1].expand(items, -1), bits[:1].expand(items, -1)
        least, most = int(bits.min(1).values.sum()), int(bits.max(1).values.sum())
        budget = int(torch.randint(least, most + 2, (1,), generator=generator))
        choice = allocate(cost, bits, budget)
        rows = torch.arange(items)
        assert bits[rows, choice].sum() <= budget
        assert cost[rows, choice].double().sum().item() == pytest.approx(enumerated(cost, bits, budget), abs=1e-6)


def test_a_whole_large_model_in_seconds():
    """48 layers x 128 experts x 3 projections; convex costs and equal steps, so the greedy choice is optimal."""
    items = 48 * 128 * 3
    scale = torch.rand(items, 1, generator=torch.Generator().manual_seed(0)).double() + 0.01
    cost = scale * torch.tensor([16.0, 4.0, 1.0], dtype=torch.float64)
    bits = (torch.arange(3) + 2).expand(items, -1) * 768 * 2048
    upgrades = 10_001
    choice = allocate(cost, bits, (2 * items + upgrades) * 768 * 2048)
    assert choice.sum() == upgrades
    saved = torch.cat([cost[:, 0] - cost[:, 1], cost[:, 1] - cost[:, 2]])
    best = cost[:, 0].sum() - saved.sort(descending=True).values[:upgrades].sum()
    assert cost[torch.arange(items), choice].sum().item() == pytest.approx(best.item(), rel=1e-9)


def test_random_sizes_of_many_items_stay_quick():
    generator = torch.Generator().manual_seed(3)
    cost = torch.rand(5000, 4, generator=generator).sort(descending=True).values
    bits = torch.randint(10**6, 10**7, (5000, 4), generator=generator).sort().values
    budget = int(bits.double().mean() * 5000 * 0.8)
    choice = allocate(cost, bits, budget)
    used = bits[torch.arange(5000), choice].sum().item()
    assert used <= budget
    assert used > 0.999 * budget


def test_enough_for_all_is_the_cheapest_of_all():
    cost = torch.tensor([[3.0, 1.0, 1.0], [0.5, 0.7, 0.9]])
    bits = torch.tensor([[1, 3, 2], [2, 4, 6]])
    assert allocate(cost, bits, 100).tolist() == [2, 0]


def test_a_budget_that_is_too_small_says_what_is_needed():
    bits = torch.tensor([[4, 8], [4, 8]])
    with pytest.raises(UserError, match="7 bits") as caught:
        allocate(torch.ones(2, 2), bits, 7)
    assert "8 bits" in caught.value.hint
