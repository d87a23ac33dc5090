"""Merging against brute force: the sums of experts, and average linkage re-implemented by its definition."""

from dataclasses import replace

import pytest
import torch

from moetools.architectures.weights import LayerWeights
from moetools.methods.base import ExpertDecision, combine_experts
from moetools.methods.merge.average import Average
from moetools.methods.merge.hc_smoe import HcSmoe


def decide(clusters, weights, router="mean"):
    return ExpertDecision(clusters=clusters, weights=weights, router=router, details={})


MIXED = decide(((4, 1), (0,), (7, 2, 3)), ((0.7, 0.3), (1.0,), (0.5, 0.2, 0.3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["mean", "centroid"])
def test_combine_experts_is_the_weighted_sum(make_weights, dtype, router):
    weights = make_weights(dtype=dtype)
    result = combine_experts(weights, replace(MIXED, router=router)).tensors()
    for name, tensor in weights.tensors().items():
        for row, (cluster, shares) in enumerate(zip(MIXED.clusters, MIXED.weights, strict=True)):
            expected = sum(share * tensor[expert].double() for expert, share in zip(cluster, shares, strict=True))
            if router == "centroid" and name in LayerWeights.ROUTER_FIELDS:
                expected = tensor[cluster[0]].double()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(result[name][row].double(), expected, rtol=eps, atol=1e-6)
        assert result[name].dtype == dtype
        assert torch.equal(result[name][1], tensor[0])


def test_combine_experts_leaves_its_input_alone_and_shares_no_memory(make_weights):
    weights, twin = make_weights(), make_weights()
    for decision in (MIXED, decide(((0,), (1,)), ((1.0,), (1.0,)))):
        for tensor in combine_experts(weights, decision).tensors().values():
            tensor.zero_()
    for name, tensor in twin.tensors().items():
        assert torch.equal(weights.tensors()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_experts_merge_without_loss(make_weights, dtype):
    weights = make_weights(dtype=dtype).select(torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]))
    decision = decide(((0, 1, 2), (3, 4, 5, 6), (7,)), ((1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.3, 0.4), (1.0,)))
    result = combine_experts(weights, decision)
    for name, tensor in weights.tensors().items():
        assert torch.equal(result.tensors()[name], tensor[[0, 3, 7]]), name


@pytest.mark.parametrize(
    ("clusters", "weights"),
    [(((0, 1), (1,)), ((0.5, 0.5), (1.0,))), (((0, 1),), ((0.5, 0.4),)), (((0, 1),), ((1.0,),)), (((),), ((),))],
)
def test_broken_decisions_are_our_bug(clusters, weights):
    with pytest.raises(AssertionError):
        decide(clusters, weights)


def average_linkage(points, members, keep):
    """Joins the two clusters with the least mean distance over all pairs of their points, recomputed every time."""
    clusters = [[member] for member in members]
    while len(clusters) > keep:
        found = [
            (sum((points[a] - points[b]).norm().item() for a in left for b in right) / (len(left) * len(right)), i, j)
            for i, left in enumerate(clusters)
            for j, right in enumerate(clusters)
            if i < j
        ]
        _, i, j = min(found)
        clusters[i] += clusters.pop(j)
    return {frozenset(cluster) for cluster in clusters}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("keep", "groups"), [(1, 1), (2, 1), (5, 1), (9, 1), (6, 2), (3, 3), (6, 3)])
def test_hc_smoe_clusters_by_average_linkage(make_statistics, make_target, seed, keep, groups):
    statistics = make_statistics(experts=12, seed=seed)
    target = make_target(keep, experts=12, groups=groups)
    decision = HcSmoe().plan(statistics, target)
    points = statistics["mean_output"]["mean"]
    size = 12 // groups
    expected = set()
    for group in range(groups):
        expected |= average_linkage(points, range(group * size, (group + 1) * size), keep // groups)
    assert {frozenset(cluster) for cluster in decision.clusters} == expected


def test_hc_smoe_weights_by_frequency_and_puts_the_most_used_first(make_statistics, make_target):
    statistics = make_statistics(experts=5, slots=[10, 60, 30, 0, 0])
    statistics["mean_output"]["mean"] = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1]])
    decision = HcSmoe().plan(statistics, make_target(2, experts=5))
    assert decision.clusters == ((1, 0, 2), (3, 4))
    assert decision.weights[0] == pytest.approx((0.6, 0.1, 0.3))
    assert decision.weights[1] == (0.5, 0.5)
    assert decision.router == "mean"
    assert decision.details["slots"] == [10, 60, 30, 0, 0]


def test_hc_smoe_with_experts_that_were_never_routed(make_statistics, make_target, make_weights):
    statistics = make_statistics(slots=[5, 0, 3, 0, 0, 2, 0, 1])
    statistics["mean_output"]["mean"][[1, 3, 4, 6]] = 0.0
    decision = HcSmoe().plan(statistics, make_target(3))
    assert {1, 3, 4, 6} <= set(max(decision.clusters, key=len))
    result = HcSmoe().apply(make_weights(), decision)
    assert all(tensor.isfinite().all() for tensor in result.tensors().values())


def test_hc_smoe_merges_duplicates_losslessly(make_statistics, make_target, make_weights):
    twins = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    statistics, weights = make_statistics(), make_weights().select(twins)
    statistics["mean_output"]["mean"] = statistics["mean_output"]["mean"][twins]
    result = HcSmoe().apply(weights, HcSmoe().plan(statistics, make_target(3)))
    for name, tensor in weights.tensors().items():
        assert torch.equal(result.tensors()[name], tensor[:3]), name


def test_hc_smoe_with_groups_of_one_expert(make_statistics, make_target):
    decision = HcSmoe().plan(make_statistics(), make_target(8, groups=8))
    assert decision.clusters == tuple((expert,) for expert in range(8))


def test_average_deals_by_load_in_snake_order(make_statistics, make_target):
    # Ranked by slots: 2 7 | 0 5 | 1 3 | 6 4; dealt 2->a 7->b, 0->b 5->a, 1->a 3->b, 6->b 4->a.
    statistics = make_statistics(slots=[60, 40, 80, 30, 10, 50, 20, 70])
    decision = Average().plan(statistics, make_target(2))
    assert decision.clusters == ((7, 0, 3, 6), (2, 1, 4, 5))
    assert decision.weights == ((0.25,) * 4,) * 2


def test_average_to_one_expert_is_the_plain_mean(make_statistics, make_target, make_weights):
    weights = make_weights()
    result = Average().apply(weights, Average().plan(make_statistics(), make_target(1)))
    for name, tensor in weights.tensors().items():
        torch.testing.assert_close(result.tensors()[name], tensor.mean(0, keepdim=True), rtol=1e-5, atol=1e-6)


def test_average_of_uneven_numbers_covers_all_experts(make_statistics, make_target):
    decision = Average().plan(make_statistics(), make_target(3))
    assert sorted(expert for cluster in decision.clusters for expert in cluster) == list(range(8))
    assert sorted(len(cluster) for cluster in decision.clusters) == [2, 3, 3]
