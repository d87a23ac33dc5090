"""Local steps on one FFN against a dense reference."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moetools.architectures.weights import WideExpert
from moetools.passes.local_fit import LocalFit, fit_locally, learning_rate_factor


def activate(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return functional.silu(gate) * up


def draw(seed: int, width: int = 12) -> WideExpert:
    generator = torch.Generator().manual_seed(seed)
    size = [(width, 6), (6, width), (width, 6)]
    up, down, gate = (torch.randn(*one, generator=generator) for one in size)
    return WideExpert(up_WD=up, down_DW=down, gate_WD=gate)


def output(ffn: WideExpert, hidden: Tensor) -> Tensor:
    assert ffn.gate_WD is not None
    return activate(hidden @ ffn.gate_WD.T, hidden @ ffn.up_WD.T) @ ffn.down_DW.T


def test_steps_approach_another_ffn_and_leave_the_start_alone() -> None:
    hidden = torch.randn(512, 6, generator=torch.Generator().manual_seed(9))
    target, start = output(draw(0), hidden), draw(1)
    kept = start.up_WD.clone()
    errors = []
    for steps in (1, 100, 400):
        fit = LocalFit(steps=steps, batch_size=128)
        errors.append((output(fit_locally(start, hidden, target, activate, fit), hidden) - target).square().mean())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert torch.equal(start.up_WD, kept)


def test_the_first_step_is_adams() -> None:
    """After one step every weight has moved by the learning rate times its tensor's root mean square."""
    hidden = torch.randn(64, 6, generator=torch.Generator().manual_seed(9))
    start = draw(1)
    found = fit_locally(start, hidden, output(draw(0), hidden), activate, LocalFit(steps=1, learning_rate=0.01))
    for one, other in ((start.up_WD, found.up_WD), (start.down_DW, found.down_DW)):
        moved = (one - other).abs() / one.square().mean().sqrt()
        assert torch.allclose(moved, torch.full_like(moved, 0.01), rtol=1e-2)


def test_it_works_inside_no_grad() -> None:
    hidden = torch.randn(64, 6)
    with torch.no_grad():
        found = fit_locally(draw(1), hidden, torch.zeros(64, 6), activate, LocalFit(steps=3))
    assert not found.up_WD.requires_grad


def test_learning_rate_warms_up_and_falls() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert all(a > b for a, b in pairwise(factors[9:]))
    assert 0 < factors[-1] < 0.001
