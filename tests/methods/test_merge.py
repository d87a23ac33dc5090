"""Merging against brute force: the sums of experts, and average linkage re-implemented by its definition."""

from dataclasses import replace

import pytest
import torch

from moetools.architectures.weights import LayerWeights
from moetools.methods.base import ExpertDecision, combine_experts
from moetools.methods.merge.average import Average
from moetools.methods.merge.frequency_average import FrequencyAverage
from moetools.methods.merge.hc_smoe import HcSmoe
from moetools.methods.merge.m_smoe import MSmoe
from moetools.methods.merge.mergemoe import MergeMoe
from moetools.methods.merge.ream import Ream, group_size
from moetools.methods.merge.saliency_average import SaliencyAverage
from moetools.methods.merge.sub_moe import SubMoe, spherical_kmeans
from moetools.methods.subspace import combine_in_subspace, subspace_mean


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
    result = combine_experts(make_weights(), decision)
    assert all(tensor.isfinite().all() for tensor in result.tensors().values())


def test_hc_smoe_merges_duplicates_losslessly(make_statistics, make_target, make_weights):
    twins = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    statistics, weights = make_statistics(), make_weights().select(twins)
    statistics["mean_output"]["mean"] = statistics["mean_output"]["mean"][twins]
    result = combine_experts(weights, HcSmoe().plan(statistics, make_target(3)))
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
    result = combine_experts(weights, Average().plan(make_statistics(), make_target(1)))
    for name, tensor in weights.tensors().items():
        torch.testing.assert_close(result.tensors()[name], tensor.mean(0, keepdim=True), rtol=1e-5, atol=1e-6)


def test_average_of_uneven_numbers_covers_all_experts(make_statistics, make_target):
    decision = Average().plan(make_statistics(), make_target(3))
    assert sorted(expert for cluster in decision.clusters for expert in cluster) == list(range(8))
    assert sorted(len(cluster) for cluster in decision.clusters) == [2, 3, 3]


def test_frequency_average_weights_by_slots(make_statistics, make_target):
    decision = FrequencyAverage().plan(make_statistics(slots=[60, 40, 80, 30, 10, 50, 20, 70]), make_target(2))
    assert decision.clusters == ((7, 0, 3, 6), (2, 1, 4, 5))
    assert decision.weights[0] == pytest.approx([70 / 180, 60 / 180, 30 / 180, 20 / 180])
    assert decision.weights[1] == pytest.approx([80 / 180, 40 / 180, 10 / 180, 50 / 180])


def test_saliency_average_ranks_and_weights_by_saliency(make_statistics, make_target):
    statistics = make_statistics()
    statistics["reap"]["saliency"] = torch.tensor([6.0, 4, 8, 3, 1, 5, 2, 7], dtype=torch.float64)
    decision = SaliencyAverage().plan(statistics, make_target(2))
    assert decision.clusters == ((7, 0, 3, 6), (2, 1, 4, 5))
    assert decision.weights[0] == pytest.approx([7 / 18, 6 / 18, 3 / 18, 2 / 18])
    assert decision.details["saliency"] == [6.0, 4, 8, 3, 1, 5, 2, 7]


def groups_of(experts, groups):
    size = experts // groups
    return [range(group * size, (group + 1) * size) for group in range(groups)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("keep", "groups"), [(1, 1), (4, 1), (11, 1), (12, 1), (6, 2), (3, 3)])
def test_m_smoe_joins_the_most_similar_dominant_expert(make_statistics, make_target, seed, keep, groups):
    statistics = make_statistics(experts=12, seed=seed)
    decision = MSmoe().plan(statistics, make_target(keep, experts=12, groups=groups))
    slots = statistics["load"]["slots"].sum(0)
    similar = statistics["router_similarity"]["similarity"]
    expected = {}
    for members in groups_of(12, groups):
        dominant = sorted(members, key=lambda e: slots[e].item())[-keep // groups :]
        for expert in members:
            home = expert if expert in dominant else max(dominant, key=lambda d, e=expert: similar[e, d].item())
            expected.setdefault(home, set()).add(expert)
    assert {cluster[0]: set(cluster) for cluster in decision.clusters} == expected
    for cluster, weights in zip(decision.clusters, decision.weights, strict=True):
        used = slots[list(cluster)].double()
        assert weights == pytest.approx((used / used.sum()).tolist())
    assert decision.router == "mean"


def brute_ream(saliency, similar, members, keep, size):
    """Group by group as the paper words it: the most salient centroid takes the nearest free experts one by one."""
    ranked = sorted(members, key=lambda e: -saliency[e].item())
    centroids, free = ranked[:keep], set(ranked[keep:])
    found = {}
    for centroid in centroids:
        found[centroid] = {centroid}
        while free and len(found[centroid]) < size:
            nearest = max(free, key=lambda e, c=centroid: similar[c, e].item())
            free.remove(nearest)
            found[centroid].add(nearest)
    assert not free
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("keep", "groups", "size"), [(1, 1, 48), (2, 1, 24), (5, 1, 10), (36, 1, 6), (48, 1, 6), (8, 2, 6), (2, 2, 24)]
)
def test_ream_groups_by_pseudo_pruning(make_statistics, make_target, seed, keep, groups, size):
    statistics = make_statistics(experts=48, seed=seed)
    decision = Ream().plan(statistics, make_target(keep, experts=48, groups=groups))
    saliency = statistics["ream_saliency"]["saliency"]
    similar = statistics["router_similarity"]["similarity"] + statistics["gated_similarity"]["cosine"]
    expected = {}
    for members in groups_of(48, groups):
        expected |= brute_ream(saliency, similar, members, keep // groups, size)
    assert {cluster[0]: set(cluster) for cluster in decision.clusters} == expected
    for cluster, weights in zip(decision.clusters, decision.weights, strict=True):
        weight = saliency[list(cluster)]
        assert weights == pytest.approx((weight / weight.sum()).tolist())
    assert decision.router == "centroid"


def test_ream_keeps_most_centroids_alone(make_statistics, make_target):
    decision = Ream().plan(make_statistics(experts=48), make_target(30, experts=48))
    assert sorted(len(cluster) for cluster in decision.clusters) == [1] * 26 + [4, 6, 6, 6]


@pytest.mark.parametrize(("experts", "count", "size"), [(128, 96, 16), (128, 4, 32), (8, 6, 2), (8, 3, 3), (64, 32, 8)])
def test_ream_scales_its_group_size(experts, count, size):
    assert group_size(experts, count) == size


def test_ream_keeps_the_router_row_of_the_centroid(make_statistics, make_target, make_weights):
    weights = make_weights()
    decision = Ream().plan(make_statistics(), make_target(2))
    result = combine_experts(weights, decision)
    firsts = [cluster[0] for cluster in decision.clusters]
    assert torch.equal(result.router_ED, weights.router_ED[firsts])
    assert torch.equal(result.correction_bias_E, weights.correction_bias_E[firsts])


@pytest.mark.parametrize(("keep", "groups"), [(1, 1), (4, 1), (6, 2)])
def test_mergemoe_groups_and_weights_by_frequency(make_statistics, make_target, keep, groups):
    statistics, target = make_statistics(experts=12), make_target(keep, experts=12, groups=groups)
    assert MergeMoe().plan(statistics, target) == MSmoe().plan(statistics, target)


def lloyd(points, seeds):
    """Spherical k-means as a textbook writes it, for points that leave no cluster empty."""
    unit = points / points.norm(dim=1, keepdim=True)
    centres = [unit[seed] for seed in seeds]
    for _ in range(50):
        label = [max(range(len(centres)), key=lambda c: (point @ centres[c]).item()) for point in unit]
        sums = [sum(point for point, own in zip(unit, label, strict=True) if own == c) for c in range(len(centres))]
        centres = [each / each.norm() for each in sums]
    return label


@pytest.mark.parametrize("seed", range(6))
def test_sub_moe_clusters_by_cosine(make_statistics, make_target, seed):
    statistics = make_statistics(experts=12, seed=seed)
    slots, points = statistics["load"]["slots"].sum(0), statistics["mean_output"]["mean"]
    seeds = sorted(range(12), key=lambda e: -slots[e].item())[:4]
    label = lloyd(points, seeds)
    expected = {frozenset(e for e in range(12) if label[e] == c) for c in range(4)}
    decision = SubMoe().plan(statistics, make_target(4, experts=12))
    assert {frozenset(cluster) for cluster in decision.clusters} == expected
    for cluster, weights in zip(decision.clusters, decision.weights, strict=True):
        used = slots[list(cluster)].double()
        assert weights == pytest.approx((used / used.sum()).tolist())


def test_no_cluster_of_like_experts_is_empty():
    same = torch.ones(5, 3, dtype=torch.float64)
    assert sorted(set(spherical_kmeans(same, [4, 1, 0]))) == [0, 1, 2]
    assert sorted(set(spherical_kmeans(0 * same, [2, 3]))) == [0, 1]


@pytest.mark.parametrize(("rows", "columns"), [(6, 9), (9, 6), (9, 2)])
@pytest.mark.parametrize("rank", [0.3, 0.5, 1.0])
def test_subspace_mean_is_the_truncated_joint_decomposition(rows, columns, rank):
    members = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(torch.cat(list(members), 1).double(), full_matrices=False)
    kept = int(torch.ceil(torch.tensor(rank * len(s), dtype=torch.float64)))
    own = vh[:kept].split(columns, 1)
    merged_v = sum(share * part for share, part in zip((0.5, 0.3, 0.2), own, strict=True))
    expected = u[:, :kept] * s[:kept] @ merged_v
    torch.testing.assert_close(
        subspace_mean(list(members), (0.5, 0.3, 0.2), rank).double(), expected, rtol=1e-4, atol=1e-5
    )


def test_sub_moe_at_full_rank_is_the_frequency_average(make_statistics, make_target, make_weights):
    weights, decision = make_weights(), SubMoe().plan(make_statistics(), make_target(3))
    assert any(len(cluster) > 1 for cluster in decision.clusters)
    plain, full = combine_experts(weights, decision), combine_in_subspace(weights, decision, 1.0)
    for name, tensor in plain.tensors().items():
        assert torch.equal(full.tensors()[name], tensor), name
    cut = combine_in_subspace(weights, decision, 0.5)
    assert not torch.equal(cut.up_EFD, plain.up_EFD)
    assert torch.equal(cut.router_ED, plain.router_ED)
    assert torch.equal(cut.down_bias_ED, plain.down_bias_ED)


def test_presets_say_what_their_papers_do():
    assert (MergeMoe.refit, MergeMoe.align, MergeMoe.weighting) == ("members", False, "frequency")
    assert (SubMoe.combine, SubMoe.align, SubMoe.weighting) == ("subspace", False, "frequency")
    assert (Ream.align, Ream.sequential, Ream.router, Ream.weighting) == (True, True, "centroid", "saliency")
    assert (MSmoe.align, MSmoe.sequential, MSmoe.router, MSmoe.weighting) == (True, False, "mean", "frequency")
    assert (HcSmoe.align, HcSmoe.sequential, HcSmoe.weighting) == (False, False, "frequency")
