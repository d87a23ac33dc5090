"""The grids of GGUF's K-quants against brute force; their bytes are compared with the gguf package in tests/formats."""

import itertools

import pytest
import torch

from moetools.errors import UserError
from moetools.grids._units import fitted_offsets, fitted_units
from moetools.grids.base import Quantized, make_grid
from moetools.grids.kquant import SHAPES, Kquant

GRIDS = [Kquant(type=kind) for kind in SHAPES]


def weights(rows: int = 6, columns: int = 512, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, rows, columns, generator=generator) * torch.logspace(-3, 0, rows)[:, None]


def every_code(grid: Kquant) -> torch.Tensor:
    return torch.arange(grid.lowest, grid.highest + 1)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type)
def test_every_code_is_the_nearest_one(grid: Kquant) -> None:
    weight = weights()
    weight[0, 0, :256] = 0
    quantized = grid.quantize(weight)
    columns = quantized.params.columns(grid.group_of_column(512, weight.device))
    zero = 0.0 if columns.zero_BOG is None else columns.zero_BOG[..., None]
    values = every_code(grid).float() * columns.scale_BOG[..., None] - zero
    nearest = (values - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((quantized.dequantize() - weight).abs(), nearest, rtol=1e-5, atol=1e-8)
    assert not quantized.dequantize()[0, 0, :256].any()
    assert make_grid(grid.describe()) == grid


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type)
def test_scales_are_integers_times_half_precision_numbers(grid: Kquant) -> None:
    params = grid.quantize(weights()).params
    unit, zero_unit = grid.units_of_groups(params)
    for value, one, least in ((params.scale_BOG, unit, grid.shape.least), (params.zero_BOG, zero_unit, 0)):
        if value is None:
            continue
        assert torch.equal(one.half().float(), one)
        places = value / one
        assert torch.equal(places, places.round())
        assert places.min() >= least
        assert places.max() <= grid.shape.most
    stored = grid.nearest_params(params, params)
    assert torch.equal(stored.scale_BOG, params.scale_BOG)
    for group in (0, 511 // grid.shape.group):
        alone = params.each(lambda one, group=group: one[..., group, None] if one.shape[2] > 2 else one)
        assert torch.equal(grid.nearest_params(alone, params, group).scale_BOG, alone.scale_BOG)


def test_units_are_close_to_the_best_of_many() -> None:
    generator = torch.Generator().manual_seed(1)
    scale, energy = torch.randn(40, 16, generator=generator), torch.rand(40, 16, generator=generator) + 0.1
    d, k = fitted_units(scale, energy, -32, 31)
    error = (energy * (d * k - scale).square()).sum(1)
    best = torch.full_like(error, torch.inf)
    for share in torch.linspace(-1, 1, 2001).tolist():
        unit = (scale.abs().amax(1, keepdim=True) * share / 16).half().float()
        places = torch.where(unit != 0, scale / unit, 0.0).round().clamp(-32, 31)
        best = torch.minimum(best, (energy * (unit * places - scale).square()).sum(1))
    assert error.sum() < 1.25 * best.sum()


def test_offsets_make_up_for_rounded_scales() -> None:
    """The error of the values: no more than where each is rounded by itself, and near the best of all k and m."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 4, (1, 2, 16), generator=generator).float()
    scale, offset = torch.tensor([[1.0, 0.31]]), torch.tensor([[1.7, 0.52]])
    moments = (torch.full((1, 2), 16.0), codes.sum(-1), codes.square().sum(-1))
    d, k, c, m = fitted_offsets(scale, offset, moments, 3)
    meant = codes * scale[..., None] - offset[..., None]

    def error(scales: torch.Tensor, offsets: torch.Tensor) -> float:
        return (codes * scales[..., None] - offsets[..., None] - meant).square().sum().item()

    units = torch.linspace(0.05, 1.0, 60).half().float().tolist()
    best = float("inf")
    for first, second in itertools.product(range(4), repeat=2):
        for unit in units:
            scales = unit * torch.tensor([[first, second]])
            ideal = offset + (moments[1] / 16) * (scales - scale)
            zero = min(
                (error(scales, other * (ideal.clamp(min=0) / other).round().clamp(max=3)) for other in units),
            )
            best = min(best, zero)
    alone = error(d * k, (c * (offset / c).round().clamp(0, 3)))
    assert error(d * k, c * m) <= alone
    assert error(d * k, c * m) < 1.5 * best


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.type)
def test_importance_moves_the_error_elsewhere(grid: Kquant) -> None:
    weight, importance = weights(rows=32), torch.ones(2, 512)
    importance[:, ::4] = 50

    def lost(quantized: Quantized) -> torch.Tensor:
        return ((quantized.dequantize() - weight).square() * importance[:, None]).sum()

    assert lost(grid.quantize(weight, importance)) < lost(grid.quantize(weight))


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="no K-quant is called 'Q7_K'"):
        make_grid({"kind": "kquant", "type": "Q7_K"})
    with pytest.raises(UserError, match="groups of 16"):
        make_grid({"kind": "kquant", "type": "Q3_K", "group_size": 32})
    with pytest.raises(UserError, match="Q3_K has blocks of 256 columns, 'weight' has 192"):
        Kquant(type="Q3_K").fit(weights(columns=192))


def test_bits_on_disk() -> None:
    expected = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
    assert {grid.type: grid.storage_bits(1, 256) / 8 for grid in GRIDS} == expected
