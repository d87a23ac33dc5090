"""GPTQ and its refinement against scalar references."""

import dataclasses

import pytest
import torch

from moetools.grids.base import Quantized
from moetools.grids.float8 import Float8
from moetools.grids.float8_block import Float8Block
from moetools.grids.integer import Integer
from moetools.grids.kquant import Kquant
from moetools.grids.mxfp4 import MxFp4
from moetools.grids.nvfp4 import NvFp4
from moetools.methods.quantize._refine import refine, row_errors
from moetools.methods.quantize._solver import damped, factorize, regular
from moetools.methods.quantize.base import Inputs, energy
from moetools.methods.quantize.gptq import METHOD, Gptq
from moetools.methods.quantize.rtn import METHOD as RTN

GRIDS = [
    Integer(bits=2, group_size=8),
    Integer(bits=3, group_size=16, symmetric=False),
    Integer(bits=3),
    Integer(bits=2, ternary=True, group_size=16),
    Integer(bits=2, symmetric=False, float_zero=True, group_size=16),
    Float8(),
    Float8Block(group_size=16, block_rows=4),
    MxFp4(),
    NvFp4(),
]
PLAIN = Gptq(sweeps=0, damping=0.01, block_size=5)


@pytest.fixture(params=GRIDS, ids=[" ".join(map(str, grid.describe().values())) for grid in GRIDS])
def any_grid(request):
    return request.param


def scalar_gptq(weight_OI, hessian_II, grid, params, damping, order):
    """GPTQ of one matrix without blocks, batches or factors: after each column, solve for all that are left."""
    columns = weight_OI.shape[1]
    hessian = hessian_II.double() + damping * hessian_II.diagonal().mean().double() * torch.eye(columns)
    group = grid.group_of_column(columns, weight_OI.device)
    weight, value = weight_OI.double().clone(), torch.zeros_like(weight_OI, dtype=torch.float64)
    left = list(order)
    for column in order:
        here = params.columns(group[[column]])
        value[:, column] = grid.decode(grid.encode(weight[None, :, [column]].float(), here), here)[0, :, 0].double()
        left.remove(column)
        if left:  # the optimal answer of the columns left to this column's error
            answer = torch.linalg.solve(hessian[left][:, left], hessian[left, column])
            weight[:, left] += (weight[:, column] - value[:, column])[:, None] * answer
    return value.float()


@pytest.mark.parametrize("activation_order", [True, False])
def test_gptq_is_the_scalar_algorithm(make_problem, any_grid, activation_order):
    weight, inputs, _ = make_problem()
    method = dataclasses.replace(PLAIN, activation_order=activation_order)
    quantized, _ = method.quantize(weight, any_grid, inputs)
    for number in range(len(weight)):
        hessian = inputs.hessian_BII[number]
        order = hessian.diagonal().argsort(descending=True) if activation_order else torch.arange(32)
        one = quantized.matrix(number)
        params = any_grid.fit(weight, inputs.hessian_BII.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(one.params.scale_BOG[0], params.scale_BOG[number], rtol=0, atol=0)
        expected = scalar_gptq(weight[number], hessian, any_grid, one.params, 0.01, order.tolist())
        torch.testing.assert_close(one.dequantize()[0], expected, rtol=1e-5, atol=1e-5)


def test_block_size_does_not_matter(make_problem, grid):
    weight, inputs, _ = make_problem()
    for sweeps in (0, 3):
        results = [
            Gptq(block_size=size, sweeps=sweeps).quantize(weight, grid, inputs)[0].dequantize() for size in (1, 7, 64)
        ]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


def test_batch_and_scratch_memory_do_not_matter(make_problem, any_grid):
    weight, inputs, _ = make_problem(batch=5)
    together, report = METHOD.quantize(weight, any_grid, inputs)
    apart, other = METHOD.quantize(weight, any_grid, inputs, work_bytes=1)
    assert torch.equal(together.codes_BOI, apart.codes_BOI)
    torch.testing.assert_close(together.dequantize(), apart.dequantize(), rtol=0, atol=1e-6)
    assert len(other.output_error) == len(report.output_error) == len(report.damping) == 5
    for first, second in zip(report.output_error, other.output_error, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


def test_the_same_twice(make_problem, any_grid):
    weight, inputs, _ = make_problem()
    first, second = (METHOD.quantize(weight, any_grid, inputs)[0] for _ in range(2))
    assert torch.equal(first.codes_BOI, second.codes_BOI)
    assert torch.equal(first.params.scale_BOG, second.params.scale_BOG)


def test_refinement_never_raises_the_error_of_any_row(make_problem, any_grid):
    weight, inputs, _ = make_problem(rows=16)
    hessian = damped(regular(inputs.hessian_BII), torch.full((3,), 0.02))
    quantized, _ = Gptq(sweeps=0).quantize(weight, any_grid, inputs)
    before = row_errors(quantized, weight, hessian)
    for _ in range(4):
        quantized = refine(quantized, weight, hessian, sweeps=1, block_size=7)
        after = row_errors(quantized, weight, hessian)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    stored = any_grid.nearest_params(quantized.params, quantized.params)
    if stored is not None:
        assert torch.equal(stored.scale_BOG, quantized.params.scale_BOG)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K"])
def test_kquants_are_solved_on_their_own_scales(make_problem, kind):
    """The scalar algorithm with scales that are integers times a number; descent lowers the error and keeps them so."""
    grid = Kquant(type=kind)
    weight, inputs, _ = make_problem(batch=2, rows=4, columns=256, tokens=400)
    quantized, _ = dataclasses.replace(PLAIN, activation_order=True).quantize(weight, grid, inputs)
    order = inputs.hessian_BII[1].diagonal().argsort(descending=True).tolist()
    expected = scalar_gptq(weight[1], inputs.hessian_BII[1], grid, quantized.matrix(1).params, 0.01, order)
    same = (quantized.dequantize()[1] - expected).abs() < 1e-4
    # A sum in fp32 that falls between two codes may go either way, and later columns answer it.
    assert same.float().mean() > 0.98
    hessian = damped(regular(inputs.hessian_BII), torch.full((2,), 0.02))
    before = first = row_errors(quantized, weight, hessian)
    for _ in range(3):
        quantized = refine(quantized, weight, hessian, sweeps=1, block_size=32)
        after = row_errors(quantized, weight, hessian)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert before.sum() < 0.9 * first.sum()
    stored = grid.nearest_params(quantized.params, quantized.params)
    assert torch.equal(stored.scale_BOG, quantized.params.scale_BOG)
    if stored.zero_BOG is not None:
        assert torch.equal(stored.zero_BOG, quantized.params.zero_BOG)


def test_refinement_ends_where_no_single_code_helps(make_problem):
    """Brute force: at the fixed point, no change of one code to any other lowers the error."""
    grid = Integer(bits=2, group_size=8)
    weight, inputs, _ = make_problem(batch=1, rows=4, columns=16)
    hessian = damped(regular(inputs.hessian_BII), torch.full((1,), 0.02))
    found = refine(grid.quantize(weight), weight, hessian, sweeps=50, block_size=8)
    # Sweeps stop at half a percent of gain; go on by hand until nothing moves.
    for _ in range(20):
        found = refine(found, weight, hessian, sweeps=1, block_size=8)
    least = row_errors(found, weight, hessian)
    for column in range(16):
        for code in range(-2, 2):
            codes = found.codes_BOI.clone()
            codes[:, :, column] = code
            other = Quantized(grid=grid, codes_BOI=codes, params=found.params)
            assert (row_errors(other, weight, hessian) >= least * (1 - 1e-3)).all()


def test_order_of_methods(make_problem, any_grid):
    weight, inputs, _ = make_problem(rows=24)
    rounded, plain, full = (
        torch.tensor(method.quantize(weight, any_grid, inputs)[1].output_error)
        for method in (RTN, Gptq(sweeps=0), METHOD)
    )
    assert (plain < rounded).all()
    assert (full <= plain * 1.001).all()


def test_output_error_is_the_loss_on_the_inputs(make_problem, grid):
    weight, inputs, samples = make_problem()
    quantized, report = METHOD.quantize(weight, grid, inputs)
    value = quantized.dequantize()
    for number, x in enumerate(samples):
        lost = (x @ (weight[number] - value[number]).T).square().sum() / (x @ weight[number].T).square().sum()
        assert report.output_error[number] == pytest.approx(lost.item(), rel=1e-3)
        distance = (weight[number] - value[number]).square().sum() / weight[number].square().sum()
        assert report.weight_error[number] == pytest.approx(distance.item(), rel=1e-5)
    assert report.slots == [80, 87, 94]
    assert not report.fallback


def test_factor(make_problem):
    _, inputs, _ = make_problem()
    factor = factorize(inputs.hessian_BII, 0.05)
    for number, hessian in enumerate(inputs.hessian_BII):
        full = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(32)
        upper = factor.upper_BII[number]
        torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(full), rtol=1e-3, atol=1e-3)
        assert not upper.tril(-1).any()
        assert 1 <= factor.condition[number] <= torch.linalg.cond(full.double()).item() * 1.01
    assert factor.damping == pytest.approx([0.05] * 3)


def test_hessians_that_are_not_positive_definite_are_damped_until_they_are(make_problem, grid):
    weight, inputs, _ = make_problem()
    hessian = inputs.hessian_BII.clone()
    hessian[1] -= 2 * hessian[1].diagonal().mean() * torch.outer(torch.ones(32), torch.ones(32)) / 32
    hessian[1].diagonal().clamp_(min=1e-3)
    assert torch.linalg.eigvalsh(hessian[1]).min() < -0.1
    quantized, report = METHOD.quantize(weight, grid, dataclasses.replace(inputs, hessian_BII=hessian))
    assert quantized.dequantize().isfinite().all()
    assert report.damping[1] > report.damping[0]
    assert report.damping[0] == report.damping[2] == pytest.approx(METHOD.damping)


def test_too_few_tokens_for_the_rank(make_problem, grid):
    weight, inputs, _ = make_problem(tokens=2)
    quantized, report = METHOD.quantize(weight, grid, inputs)
    assert quantized.dequantize().isfinite().all()
    assert max(report.output_error) < 0.05


def test_columns_without_inputs_are_rounded_to_nearest(make_problem, grid):
    weight, inputs, _ = make_problem()
    dead = [3, 17]
    hessian = inputs.hessian_BII.clone()
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    quantized, _ = METHOD.quantize(weight, grid, dataclasses.replace(inputs, hessian_BII=hessian))
    params = quantized.params.columns(grid.group_of_column(32, weight.device)[dead])
    assert torch.equal(quantized.codes_BOI[:, :, dead], grid.encode(weight[:, :, dead], params))


def test_an_expert_without_tokens_is_rounded_to_nearest_and_named(make_problem, grid):
    weight, inputs, _ = make_problem()
    hessian = inputs.hessian_BII.clone()
    hessian[1] = 0
    empty = Inputs(hessian_BII=hessian, count_B=torch.tensor([80, 0, 94]))
    quantized, report = METHOD.quantize(weight, grid, empty)
    assert report.fallback == [1]
    assert report.output_error[1] == 0
    rounded = RTN.quantize(weight[1:2], grid)[0].dequantize()
    distance = (rounded - weight[1:2]).square().sum() / weight[1:2].square().sum()
    assert report.weight_error[1] <= distance.item() * 1.001
    alone, _ = METHOD.quantize(weight[[0]], grid, inputs.matrices(slice(0, 1)))
    assert torch.equal(quantized.codes_BOI[:1], alone.codes_BOI)


def test_half_precision_weights(make_problem, grid):
    weight, inputs, _ = make_problem()
    weight = weight.bfloat16()
    first, _ = METHOD.quantize(weight, grid, inputs)
    second, _ = METHOD.quantize(weight.float(), grid, inputs)
    assert torch.equal(first.codes_BOI, second.codes_BOI)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_error(make_problem, any_grid):
    weight, inputs, _ = make_problem()
    there = Inputs(hessian_BII=inputs.hessian_BII.cuda(), count_B=inputs.count_B.cuda())
    quantized, report = METHOD.quantize(weight.cuda(), any_grid, there)
    assert quantized.codes_BOI.is_cuda
    _, expected = METHOD.quantize(weight, any_grid, inputs)
    assert report.output_error == pytest.approx(expected.output_error, rel=0.05)


def test_energy(make_problem):
    weight, inputs, samples = make_problem()
    for number, value in enumerate(energy(weight, inputs.hessian_BII).tolist()):
        assert value == pytest.approx((samples[number] @ weight[number].T).square().sum(1).mean().item(), rel=1e-4)
