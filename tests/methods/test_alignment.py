"""Alignment against all permutations, and what it must never do: change a function, or lose a permuted copy."""

import itertools
from dataclasses import replace

import pytest
import torch

from moetools.errors import StatisticsError
from moetools.methods.alignment import NEURON_DIM, align_cluster, align_neurons
from moetools.methods.base import ExpertDecision, combine_experts

ORDER = torch.tensor([2, 0, 3, 1])


def merge(*clusters):
    weights = tuple((1 / len(cluster),) * len(cluster) for cluster in clusters)
    return ExpertDecision(clusters=clusters, weights=weights, router="centroid", details={})


def with_biases(weights, seed=5):
    generator = torch.Generator().manual_seed(seed)
    size = weights.up_EFD.shape[:2]
    return replace(
        weights,
        gate_bias_EF=torch.randn(size, generator=generator).to(weights.up_EFD.dtype),
        up_bias_EF=torch.randn(size, generator=generator).to(weights.up_EFD.dtype),
    )


def with_copy(weights, source, target, order):
    """Expert `target` becomes expert `source` with its neurons in another order."""
    changed = {}
    for name, tensor in weights.tensors().items():
        changed[name] = tensor.clone()
        moved = tensor[source]
        if name in NEURON_DIM:
            moved = moved.index_select(NEURON_DIM[name] - 1, order)
        changed[name][target] = moved
    return replace(weights, **changed)


def neuron_cost(weights, i, j, member, centroid, activations):
    """cost(i, j) as the docstring writes it, in fp64, one pair of neurons at a time."""

    def part(theirs, own):
        scale = (theirs.square().sum(1).mean() + own.square().sum(1).mean()) / 2
        return ((theirs[i] - own[j]).square().sum() / scale).item()

    def rows(tensor, bias, expert):
        return torch.cat([tensor[expert], bias[expert][:, None]], 1).double()

    costs = [
        part(
            rows(weights.gate_EFD, weights.gate_bias_EF, centroid), rows(weights.gate_EFD, weights.gate_bias_EF, member)
        ),
        part(rows(weights.up_EFD, weights.up_bias_EF, centroid), rows(weights.up_EFD, weights.up_bias_EF, member)),
        part(weights.down_EDF[centroid].double().T, weights.down_EDF[member].double().T),
    ]
    total = sum(costs) / 3
    if activations is not None:
        own, theirs = (activation.double().T for activation in activations)
        total += part(theirs, own)
    return total


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_activations", [True, False])
def test_the_assignment_is_the_best_of_all_permutations(make_weights, make_sample, seed, with_activations):
    weights, sample = with_biases(make_weights(seed=seed)), make_sample(seed=seed)
    activations = (sample.intermediate(weights, 5), sample.intermediate(weights, 2)) if with_activations else None

    def total(order):
        return sum(neuron_cost(weights, i, j, 5, 2, activations) for i, j in enumerate(order))

    found = align_neurons(weights, 5, 2, activations=activations)
    assert found.tolist() == list(min(itertools.permutations(range(4)), key=total))
    assert found.dtype == torch.int64


@pytest.mark.parametrize("with_activations", [True, False])
def test_a_permuted_copy_is_put_back_in_order(make_weights, make_sample, with_activations):
    weights, sample = with_copy(with_biases(make_weights()), 2, 5, ORDER), make_sample()
    activations = (sample.intermediate(weights, 5), sample.intermediate(weights, 2)) if with_activations else None
    found = align_neurons(weights, 5, 2, activations=activations)
    assert torch.equal(ORDER[found], torch.arange(4))


def test_activations_decide_between_equal_weights(make_weights):
    weights = make_weights()
    weights = replace(
        weights, **{name: torch.ones_like(weights.tensors()[name]) for name in NEURON_DIM if name in weights.tensors()}
    )
    theirs = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    found = align_neurons(weights, 5, 2, activations=(theirs[:, ORDER], theirs))
    assert torch.equal(ORDER[found], torch.arange(4))


@pytest.mark.parametrize("gated", [True, False])
def test_alignment_changes_no_function(make_weights, make_sample, gated):
    weights, sample = make_weights(width=6), make_sample()
    weights = with_biases(weights) if gated else replace(weights, gate_EFD=None)
    before = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    aligned = align_cluster(
        weights, merge((4, 1, 6), (0,), (7, 2)), lambda expert: sample.intermediate(weights, expert)
    )
    moved = [not torch.equal(aligned.up_EFD[expert], weights.up_EFD[expert]) for expert in range(8)]
    assert moved == [expert in (1, 2, 6) for expert in range(8)]
    for expert in range(8):
        torch.testing.assert_close(sample.output(aligned, expert), sample.output(weights, expert))
    for name, tensor in before.items():
        assert torch.equal(weights.tensors()[name], tensor), f"{name} of the input was changed"
        if name not in NEURON_DIM:
            assert torch.equal(aligned.tensors()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_activations", [True, False])
def test_merging_with_permuted_copies_is_lossless(make_weights, make_sample, dtype, with_activations):
    weights, sample = with_biases(make_weights(dtype=dtype)), make_sample()
    for target, order in ((5, ORDER), (1, ORDER.flip(0)), (6, torch.arange(4))):
        weights = with_copy(weights, 2, target, order)
    decision = merge((2, 1, 5, 6), (0,), (7,))
    intermediates = (lambda expert: sample.intermediate(weights, expert)) if with_activations else None
    result = combine_experts(align_cluster(weights, decision, intermediates), decision)
    for name, tensor in weights.tensors().items():
        assert torch.equal(result.tensors()[name], tensor[[2, 0, 7]]), name
    plain = combine_experts(weights, decision)
    assert not torch.equal(plain.up_EFD[0], weights.up_EFD[2]), "without alignment the copies would blur"


def test_permuting_neurons_before_merging_changes_nothing(make_weights, make_sample):
    weights, sample = make_weights(width=6), make_sample()
    order = torch.tensor([5, 3, 0, 2, 4, 1])
    shuffled, decision = with_copy(weights, 6, 6, order), merge((4, 1, 6), (0, 2))

    def merged(layer):
        return combine_experts(align_cluster(layer, decision, lambda e: sample.intermediate(layer, e)), decision)

    for name, tensor in merged(weights).tensors().items():
        torch.testing.assert_close(merged(shuffled).tensors()[name], tensor, rtol=1e-6, atol=1e-6)


def test_without_clusters_nothing_is_copied_or_computed(make_weights):
    weights = make_weights()

    def never(expert):
        raise AssertionError("no intermediates are needed")

    assert align_cluster(weights, merge((0,), (3,)), never) is weights


def test_experts_without_any_weight_do_not_divide_by_zero(make_weights):
    weights = make_weights()
    weights.up_EFD.zero_()
    weights.gate_EFD[[2, 5]] = 0
    weights.down_EDF[[2, 5]] = 0
    assert sorted(align_neurons(weights, 5, 2, activations=(torch.zeros(3, 4), torch.zeros(3, 4)))) == list(range(4))


def test_values_that_are_not_finite_are_refused(make_weights):
    weights = make_weights()
    weights.up_EFD[5, 0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="expert 5 cannot be aligned to expert 2"):
        align_neurons(weights, 5, 2)
