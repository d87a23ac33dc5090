"""The entropy-coded grid: steps by importance, rates that are met, information that is counted right."""

import math

import pytest
import torch

from moetools.errors import UserError
from moetools.grids.base import Params, Quantized, make_grid
from moetools.grids.entropy import (
    ColumnTables,
    EntropyGrid,
    chunks_of,
    meet_rate,
    overhead_bits,
    scale_factors,
    stream_bits,
    table_bits,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_grid_survives_its_description() -> None:
    grid = EntropyGrid(rate=0.7, step=0.1, step_scale=1.5, levels=3)
    assert make_grid(grid.describe()) == grid


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.01}, "0.05 to 6"),
        ({"rate": 9.0}, "0.05 to 6"),
        ({"step": -1.0}, "not a positive"),
        ({"step_scale": 0.0}, "not a positive"),
        ({"levels": 128}, "1 to 127"),
        ({"group_size": 64}, "no groups"),
    ],
)
def test_impossible_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EntropyGrid(**fields)


def test_steps_equalise_importance_times_step_squared() -> None:
    """Up to the rounding to quarter octaves, over columns and matrices alike, and the same for every row."""
    importance_BI = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) * 99 + 1
    params = EntropyGrid(step=0.3).fit(gaussian(3, 8, 40), importance_BI)
    product_BOI = params.scale_BOG * importance_BI[:, None, :].sqrt()
    assert product_BOI.log2().sub(math.log2(0.3)).abs().max() <= 0.125 + 1e-5
    assert torch.equal(params.scale_BOG, params.scale_BOG[:, :1].expand(3, 8, 40))


def test_scale_factors_are_powers_of_the_fourth_root_of_two() -> None:
    exponent_I = torch.arange(-40, 41)
    assert torch.allclose(scale_factors(exponent_I).double(), 2.0 ** (exponent_I.double() / 4), rtol=1e-7)
    assert torch.equal(scale_factors(exponent_I)[4:], 2 * scale_factors(exponent_I)[:-4])


def test_columns_without_importance_get_large_finite_steps() -> None:
    importance_BI = torch.ones(2, 16)
    importance_BI[0, 3], importance_BI[1] = 0, 0
    params = EntropyGrid(step=0.1).fit(gaussian(2, 4, 16), importance_BI)
    assert torch.isfinite(params.scale_BOG).all()
    assert (params.scale_BOG[0, :, 3] > 1000 * params.scale_BOG[0, :, 0]).all()
    assert (params.scale_BOG[1] > 1000 * params.scale_BOG[0, 0, 0]).all()


def test_codes_are_the_nearest_of_all_representable_values() -> None:
    grid = EntropyGrid(step=0.4, levels=3)
    weight_BOI = gaussian(1, 6, 5)
    quantized = grid.quantize(weight_BOI)
    value_V = torch.arange(-3, 4) * 0.4
    nearest_BOI = (weight_BOI[..., None] - value_V).abs().argmin(-1) - 3
    assert torch.equal(quantized.codes_BOI.long(), nearest_BOI)
    assert torch.allclose(quantized.dequantize(), nearest_BOI * 0.4)


def test_columns_can_be_encoded_one_at_a_time_in_any_order() -> None:
    grid = EntropyGrid(rate=2.0, step=0.5)
    weight_BOI, importance_BI = gaussian(2, 7, 9), torch.rand(2, 9) + 0.1
    params = grid.fit(weight_BOI, importance_BI)
    whole = grid.encode(weight_BOI, params)
    for column in (8, 0, 4):
        one = grid.encode(weight_BOI[:, :, [column]], params.columns(torch.tensor([column])))
        assert torch.equal(one, whole[:, :, [column]])


@pytest.mark.parametrize("rate", [0.4, 1.0, 2.5])
def test_fit_meets_the_rate(rate: float) -> None:
    weight_BOI = gaussian(2, 192, 256)
    quantized = EntropyGrid(rate=rate).quantize(weight_BOI, torch.rand(2, 256) ** 3 + 1e-3)
    assert float(stream_bits(quantized).sum()) / weight_BOI.numel() == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize("rate", [0.3, 1.5, 3.5, 5.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_fit_meets_the_rate_of_heavy_tails_on_any_scale(rate: float, scale: float) -> None:
    """Codes that are cut off take few bits too, which must not pass for what was asked."""
    generator = torch.Generator().manual_seed(4)
    weight = scale * torch.empty(1, 256, 128).exponential_(generator=generator) * torch.randn(256, 128).sign()
    found = EntropyGrid(rate=rate).quantize(weight)
    assert float(stream_bits(found).sum()) / weight.numel() == pytest.approx(rate, rel=0.05)
    assert (found.codes_BOI.abs() == 127).float().mean() < 0.01


def test_a_rate_out_of_reach_gives_the_highest_there_is() -> None:
    weight = torch.randn(1, 256, 128, generator=torch.Generator().manual_seed(4))
    ternary = EntropyGrid(rate=3.0, levels=1).quantize(weight)
    assert float(stream_bits(ternary).sum()) / weight.numel() > 1.4


def test_bits_go_to_the_matrix_that_matters() -> None:
    importance_BI = torch.ones(2, 128) * torch.tensor([[16.0], [1.0]])
    quantized = EntropyGrid(rate=2.0).quantize(gaussian(2, 256, 128), importance_BI)
    more, less = (stream_bits(quantized) / (256 * 128)).tolist()
    # Four times the importance is half the step: one bit more at high rates, and this is twice four times.
    assert more - less == pytest.approx(2.0, abs=0.25)


def test_fit_refuses_matrices_that_are_all_overhead() -> None:
    with pytest.raises(UserError, match="overhead"):
        EntropyGrid(rate=1.0).fit(gaussian(1, 8, 8))


def test_all_zero_weights_can_be_fitted() -> None:
    quantized = EntropyGrid(rate=1.0).quantize(torch.zeros(1, 128, 128))
    assert not quantized.codes_BOI.any()


def test_one_table_counts_the_entropy() -> None:
    codes_OI = torch.tensor([[0, 0, 0, 1], [0, -1, 0, 0]], dtype=torch.int8)
    tables = ColumnTables.fit(codes_OI)
    entropy = -8 * (0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) + 2
    assert len(tables.count_KA) == 1
    assert tables.information == pytest.approx(entropy)


def test_tables_separate_columns_of_different_widths() -> None:
    """Half the columns are zeros, half are wide: the information is that of the wide half alone."""
    codes_OI = (gaussian(512, 64) * 4 * (torch.arange(64) % 2)).round().to(torch.int8)
    tables = ColumnTables.fit(codes_OI)
    _, count = codes_OI[:, 1::2].unique(return_counts=True)
    entropy = float(-(count * (count / count.sum()).log2()).sum())
    assert tables.information == pytest.approx(entropy, rel=0.002)
    assert set(tables.table_I[::2].tolist()).isdisjoint(tables.table_I[1::2].tolist())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (192, 384), (384, 192), (7, 4097), (512, 300), (768, 2048)])
def test_chunks_are_of_about_the_same_size(rows: int, columns: int) -> None:
    chunks = chunks_of(rows * columns)
    assert chunks == 1 or 2**16 * 2 / 3 <= rows * columns / chunks <= 2**16 * 3 / 2
    assert overhead_bits(rows, columns) > 512 * chunks


def test_meet_rate_corrects_what_compensation_adds() -> None:
    """A quantizer whose weights are wider than those that `fit` saw, as behind GPTQ."""
    weight_BOI, calls = gaussian(2, 128, 256), []

    def quantize(grid: EntropyGrid) -> Quantized:
        params = grid.fit(weight_BOI)
        calls.append(grid.step_scale)
        return Quantized(grid=grid, codes_BOI=grid.encode(weight_BOI * 1.5, params), params=params)

    quantized = meet_rate(EntropyGrid(rate=1.2), quantize, tolerance=0.005)
    assert float(stream_bits(quantized).sum()) / weight_BOI.numel() == pytest.approx(1.2, rel=0.005)
    assert calls[0] == 1
    assert 1 < len(calls) <= 5


def test_meet_rate_returns_the_nearest_of_its_attempts() -> None:
    codes = {}

    def quantize(grid: EntropyGrid) -> Quantized:
        """Answers the wrong way round, so that the search runs away."""
        width = min(4 * grid.step_scale, 25.0)
        codes[width] = (gaussian(1, 64, 256) * width).round().clamp(-127, 127).to(torch.int8)
        return Quantized(grid=grid, codes_BOI=codes[width], params=Params(scale_BOG=torch.ones(1, 64, 256)))

    quantized = meet_rate(EntropyGrid(rate=1.0), quantize, attempts=3)
    assert len(codes) > 1
    assert quantized.codes_BOI is codes[4.0]


def test_many_matrices_at_once_cost_what_each_alone_costs() -> None:
    """Also where their largest codes differ, and for empty ones and ones without columns."""
    generator = torch.Generator().manual_seed(0)
    for size, spread in (((5, 64, 96), 2.0), ((3, 32, 7), 5.0), ((2, 16, 1), 0.1), ((3, 8, 8), 40.0), ((2, 8, 0), 1.0)):
        width_B1I = spread * torch.rand(size[0], 1, size[2], generator=generator)
        codes_BOI = (torch.randn(size, generator=generator) * width_B1I).round().clamp(-127, 127).to(torch.int8)
        information_B, overhead_B = table_bits(codes_BOI)
        alone = [ColumnTables.fit(codes_OI) for codes_OI in codes_BOI]
        assert information_B.tolist() == pytest.approx([tables.information for tables in alone])
        assert overhead_B.tolist() == [tables.overhead for tables in alone]
