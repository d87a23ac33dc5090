"""Made-up weights with correlated inputs, and a grid."""

from collections.abc import Callable

import pytest
import torch

from moetools.grids.integer import Integer
from moetools.methods.quantize.base import Inputs


@pytest.fixture
def make_problem() -> Callable[..., tuple[torch.Tensor, Inputs, list[torch.Tensor]]]:
    """weight [B, O, I], its inputs' sums, and the inputs themselves."""

    def make(batch=3, rows=6, columns=32, tokens=80, seed=0):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(batch, rows, columns, generator=generator)
        mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
        mix *= torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]
        samples = [torch.randn(tokens + 7 * number, columns, generator=generator) @ mix for number in range(batch)]
        hessian = torch.stack([x.T @ x / len(x) for x in samples])
        return weight, Inputs(hessian_BII=hessian, count_B=torch.tensor([len(x) for x in samples])), samples

    return make


@pytest.fixture
def grid() -> Integer:
    return Integer(bits=3, group_size=8)
