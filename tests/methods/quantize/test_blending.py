"""Blending of Hessians against its formula."""

import torch

from moetools.methods.blending import blend, blend_moments, layer_hessian
from moetools.methods.quantize.base import Inputs


def test_layer_hessian_is_the_mean_over_all_slots(make_problem):
    _, inputs, samples = make_problem()
    every = torch.cat(samples)
    torch.testing.assert_close(layer_hessian(inputs), every.T @ every / len(every), rtol=1e-4, atol=1e-4)


def test_blend_is_a_mean_with_pseudo_slots(make_problem):
    _, inputs, samples = make_problem(tokens=20)
    prior = layer_hessian(inputs)
    blended = blend(inputs, prior, strength=0.5).hessian_BII
    for number, x in enumerate(samples):
        own = x.T @ x / len(x)
        scaled = prior * own.diagonal().sum() / prior.diagonal().sum()
        expected = (len(x) * own + 16 * scaled) / (len(x) + 16)
        torch.testing.assert_close(blended[number], expected, rtol=1e-4, atol=1e-4)


def test_without_a_prior_only_correlations_shrink(make_problem):
    _, inputs, _ = make_problem()
    blended = blend(inputs, strength=1.0).hessian_BII
    own = inputs.hessian_BII
    diagonals = own.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(blended.diagonal(dim1=1, dim2=2), diagonals, rtol=1e-5, atol=1e-6)
    off = own - torch.diag_embed(diagonals)
    share = (inputs.count_B / (inputs.count_B + 32))[:, None, None]
    torch.testing.assert_close(blended - torch.diag_embed(diagonals), off * share, rtol=1e-4, atol=1e-5)


def test_an_expert_without_slots_takes_the_prior(make_problem):
    _, inputs, _ = make_problem()
    hessian = inputs.hessian_BII.clone()
    hessian[1] = 0
    empty = Inputs(hessian_BII=hessian, count_B=torch.tensor([80, 0, 94]))
    prior = layer_hessian(empty)
    blended = blend(empty, prior)
    torch.testing.assert_close(blended.hessian_BII[1], prior, rtol=1e-6, atol=1e-7)
    assert not blend(empty).hessian_BII[1].any()


def test_strength_zero_changes_nothing(make_problem):
    _, inputs, _ = make_problem()
    same = blend(inputs, layer_hessian(inputs), strength=0.0)
    assert torch.equal(same.hessian_BII, inputs.hessian_BII)


def test_blending_generalises_better_from_few_tokens():
    """Experts of one distribution: the blended Hessian of 20 tokens is nearer to the truth than their own."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator) / 6 + torch.eye(32)
    counts = [20, 400, 400, 400]
    samples = [torch.randn(count, 32, generator=generator) @ mix for count in counts]
    hessian = torch.stack([x.T @ x / len(x) for x in samples])
    inputs = Inputs(hessian_BII=hessian, count_B=torch.tensor(counts))
    truth = mix.T @ mix
    before, after = (
        (found.hessian_BII[0] - truth).norm().item() for found in (inputs, blend(inputs, layer_hessian(inputs)))
    )
    assert after < 0.6 * before


def test_moments_alone_are_blended_as_the_diagonals_are(make_problem):
    _, inputs, _ = make_problem()
    hessian = inputs.hessian_BII.clone()
    hessian[1] = 0
    empty = Inputs(hessian_BII=hessian, count_B=torch.tensor([80, 0, 3]))
    expected = blend(empty, layer_hessian(empty)).hessian_BII.diagonal(dim1=1, dim2=2)
    found = blend_moments(hessian.diagonal(dim1=1, dim2=2), empty.count_B)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
