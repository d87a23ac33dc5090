"""What every quantization method must obey, and RTN, HQQ and AWQ against references."""

import dataclasses
import json

import pytest
import torch

from moetools.errors import UserError
from moetools.grids.base import Params
from moetools.grids.float8_block import Float8Block
from moetools.grids.integer import Integer
from moetools.grids.mxfp4 import MxFp4
from moetools.grids.nvfp4 import NvFp4
from moetools.methods.quantize.awq import METHOD as AWQ
from moetools.methods.quantize.awq import scaled_inputs
from moetools.methods.quantize.hqq import METHOD as HQQ
from moetools.methods.quantize.rtn import METHOD as RTN
from moetools.plugins import load_plugin, plugin_names

METHODS = plugin_names("moetools.methods.quantize")


@pytest.fixture(params=METHODS)
def method(request):
    return load_plugin("moetools.methods.quantize", request.param, kind="method").METHOD


def test_the_promised_methods_are_there():
    assert {"rtn", "gptq", "hqq", "awq"} <= set(METHODS)


def test_contract(method, make_problem, grid):
    weight, inputs, _ = make_problem()
    before = weight.clone(), inputs.hessian_BII.clone()
    quantized, report = method.quantize(weight, grid, inputs)
    assert method.name in METHODS
    assert quantized.codes_BOI.shape == weight.shape
    assert quantized.params.scale_BOG.shape == (3, 6, 4)
    assert report.slots == [80, 87, 94]
    assert len(report.weight_error) == len(report.output_error) == 3
    assert max(report.weight_error) < 0.2
    json.dumps(dataclasses.asdict(report), allow_nan=False)
    assert torch.equal(weight, before[0])
    assert torch.equal(inputs.hessian_BII, before[1])
    again, _ = method.quantize(weight, grid, inputs, work_bytes=1)
    assert torch.equal(again.codes_BOI, quantized.codes_BOI)


def test_inputs_are_asked_for_where_they_are_needed(method, make_problem, grid):
    weight, _, _ = make_problem()
    if method.needs_inputs:
        with pytest.raises(AssertionError, match="needs inputs"):
            method.quantize(weight, grid)
        return
    _, report = method.quantize(weight, grid)
    assert report.output_error == report.slots == []


def test_weights_of_zero_and_experts_alike(method, make_problem, grid):
    weight, inputs, _ = make_problem()
    weight[1] = 0
    quantized, report = method.quantize(weight, grid, inputs)
    assert not quantized.dequantize()[1].any()
    assert report.output_error[1] == report.weight_error[1] == 0


def test_rtn_weighs_columns_by_their_inputs(make_problem, grid):
    weight, inputs, _ = make_problem(rows=64)
    importance = inputs.hessian_BII.diagonal(dim1=1, dim2=2)[:, None]
    blind, aware = (RTN.quantize(weight, grid, given)[0].dequantize() for given in (None, inputs))
    assert ((aware - weight).square() * importance).sum() < ((blind - weight).square() * importance).sum()
    assert (aware - weight).square().sum() > (blind - weight).square().sum()


def scalar_hqq(row, params, method):
    """HQQ of one row and one group with a float zero: the formulas of `Hqq` on lists of numbers."""
    scale, zero = params.scale_BOG.item(), params.zero_BOG.item()
    best, least, beta = zero, float("inf"), method.beta
    for _ in range(method.iterations):
        codes = [min(max(round(w / scale + zero), 0), 3) for w in row]
        errors = [w - (c - zero) * scale for w, c in zip(row, codes, strict=True)]
        lost = sum(abs(error) ** method.power for error in errors)
        if lost >= least:
            break
        best, least = zero, lost
        left = []
        for error in errors:
            size = abs(error / scale)
            kept = max(0.0, size - size ** (method.power - 1) / beta) if size > 1e-8 else 0.0
            left.append(kept * scale * (1 if error > 0 else -1))
        zero = sum(c - (w - e) / scale for c, w, e in zip(codes, row, left, strict=True)) / len(row)
        beta *= method.growth
    return best


def test_hqq_is_the_scalar_algorithm():
    grid = Integer(bits=2, symmetric=False, float_zero=True, scale_dtype="float32")
    weight = torch.randn(1, 12, 40, generator=torch.Generator().manual_seed(2))
    start = grid.fit(weight)
    quantized, _ = HQQ.quantize(weight, grid)
    torch.testing.assert_close(quantized.params.scale_BOG, start.scale_BOG, rtol=0, atol=0)
    for number in range(12):
        row = Params(scale_BOG=start.scale_BOG[:, [number]], zero_BOG=start.zero_BOG[:, [number]])
        expected = scalar_hqq(weight[0, number].tolist(), row, HQQ)
        assert quantized.params.zero_BOG[0, number].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "grid",
    [
        Integer(bits=2, group_size=8),
        Integer(bits=2, group_size=8, symmetric=False),
        Integer(bits=3, group_size=16, symmetric=False, float_zero=True),
        NvFp4(),
        MxFp4(),
    ],
    ids=str,
)
def test_hqq_lowers_its_own_norm(grid):
    weight = torch.distributions.StudentT(3.0).sample((2, 20, 64))
    lost = [
        (method.quantize(weight, grid)[0].dequantize() - weight).abs().pow(HQQ.power).sum().item()
        for method in (RTN, HQQ)
    ]
    assert lost[1] <= lost[0] * (1 + 1e-6)


def test_hqq_refuses_scales_that_rows_share():
    with pytest.raises(UserError, match="rows share"):
        HQQ.quantize(torch.ones(1, 4, 128), Float8Block())


def test_awq_scales_are_powers_of_two_that_lower_the_error():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 32, 64, generator=generator)
    samples = torch.randn(2, 500, 64, generator=generator)
    samples[:, :, ::16] *= 30
    from moetools.methods.quantize.base import Inputs

    inputs = Inputs(hessian_BII=samples.mT @ samples / 500, count_B=torch.tensor([500, 500]))
    grid = Integer(bits=3, group_size=16)
    scale = AWQ.column_scales(weight, grid, inputs)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (scale[:, ::16] > scale.median()).all()
    value = AWQ.quantize(weight * scale[:, None], grid, scaled_inputs(inputs, scale))[0].dequantize()
    plain = AWQ.quantize(weight, grid, inputs)[0].dequantize()
    lost_scaled = ((samples / scale[:, None]) @ value.mT - samples @ weight.mT).square().sum((1, 2))
    lost_plain = (samples @ (plain - weight).mT).square().sum((1, 2))
    assert (lost_scaled < 0.9 * lost_plain).all()


def test_column_scales_of_other_methods_are_one(make_problem, grid):
    weight, inputs, _ = make_problem()
    assert torch.equal(RTN.column_scales(weight, grid, inputs), torch.ones(3, 32))
    assert [
        name for name in METHODS if load_plugin("moetools.methods.quantize", name, kind="").METHOD.scales_columns
    ] == ["awq"]
