"""What every pruning and merging method must obey, run over all files found."""

import dataclasses
import json

import pytest
import torch

from moetools.errors import StatisticsError
from moetools.methods.base import combine_experts
from moetools.plugins import load_plugin, plugin_names
from moetools.statistics.base import LayerShape

PER_TASK = {"load", "router"}
PAIRS = {"router_similarity", "gated_similarity"}


def test_the_packages_hold_the_promised_methods():
    prune, merge = (set(plugin_names(f"moetools.methods.{family}")) for family in ("prune", "merge"))
    assert {"reap", "frequency", "ean", "random", "gate-mass", "easy-ep", "naee"} <= prune
    assert {"hc-smoe", "average", "frequency-average", "saliency-average", "m-smoe", "ream"} <= merge


@pytest.fixture
def decide(method, make_weights, make_sample):
    """The method's decision, as the engine asks for it."""

    def plan(statistics, target):
        return method.plan_with_sample(statistics, target, make_weights(), make_sample())

    return plan


def test_name_is_the_file_name_and_needs_exist(method, method_file):
    assert method.name == method_file[1]
    for name in method.needs:
        assert load_plugin("moetools.statistics", name, kind="statistic").STATISTIC.name == name


def test_the_made_up_statistics_have_the_real_layout(make_statistics):
    shape = LayerShape(num_experts=8, top_k=2, hidden_size=5, expert_size=4, num_tasks=2)
    for name, quantities in make_statistics().items():
        statistic = load_plugin("moetools.statistics", name, kind="statistic").STATISTIC
        real = statistic.finalize(statistic.init(shape, torch.device("cpu")))
        for key, value in quantities.items():
            assert (real[key].shape, real[key].dtype) == (value.shape, value.dtype), f"{name}.{key}"


@pytest.mark.parametrize(("keep", "groups"), [(1, 1), (3, 1), (7, 1), (8, 1), (2, 2), (6, 2), (4, 4)])
def test_decision_is_a_weighted_partition_that_respects_groups(decide, make_statistics, make_target, keep, groups):
    decision = decide(make_statistics(), make_target(keep, groups=groups))
    assert len(decision.clusters) == keep
    members = [expert for cluster in decision.clusters for expert in cluster]
    assert len(set(members)) == len(members)
    assert set(members) <= set(range(8))
    for row, (cluster, weights) in enumerate(zip(decision.clusters, decision.weights, strict=True)):
        assert {expert // (8 // groups) for expert in cluster} == {row // (keep // groups)}
        assert len(weights) == len(cluster)
        assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    text = json.dumps(dataclasses.asdict(decision), allow_nan=False)
    assert json.loads(text)["clusters"] == [list(cluster) for cluster in decision.clusters]


def test_smallest_members_ascend(decide, make_statistics, make_target):
    decision = decide(make_statistics(), make_target(4, groups=2))
    smallest = [min(cluster) for cluster in decision.clusters]
    assert smallest == sorted(smallest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_all_experts_changes_no_bit(method, decide, make_statistics, make_target, make_weights, dtype):
    weights = make_weights(dtype=dtype)
    result = combine_experts(weights, decide(make_statistics(), make_target(8)))
    for name, tensor in weights.tensors().items():
        assert torch.equal(result.tensors()[name], tensor), name


@pytest.mark.parametrize("keep", [1, 3])
def test_apply_gives_the_kept_number_in_the_input_dtype(
    method, decide, make_statistics, make_target, make_weights, keep
):
    weights = make_weights(dtype=torch.bfloat16)
    result = combine_experts(weights, decide(make_statistics(), make_target(keep)))
    for name, tensor in result.tensors().items():
        assert tensor.shape == (keep, *weights.tensors()[name].shape[1:])
        assert tensor.dtype == torch.bfloat16


def test_plan_is_deterministic_and_leaves_statistics_alone(decide, make_statistics, make_target):
    statistics, twin = make_statistics(), make_statistics()
    assert decide(statistics, make_target(3)) == decide(statistics, make_target(3))
    for name in twin:
        for key, value in twin[name].items():
            assert torch.equal(statistics[name][key], value)


def test_missing_statistic_is_named(method, make_statistics, make_target):
    for needed in method.needs:
        statistics = make_statistics()
        del statistics[needed]
        with pytest.raises(StatisticsError, match=f"layer 3: statistic '{needed}' .* is missing"):
            method.plan(statistics, make_target(3))


def test_statistics_of_another_model_are_refused(method, make_statistics, make_target):
    if method.needs:
        with pytest.raises(StatisticsError, match="is for 16 experts, the layer has 8"):
            method.plan(make_statistics(experts=16), make_target(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(method, make_statistics, make_target, value):
    for needed in method.needs:
        statistics = make_statistics()
        quantities = {key: tensor.clone().double() for key, tensor in statistics[needed].items()}
        for tensor in quantities.values():
            tensor.movedim(-1 if needed in PER_TASK else 0, 0)[5] = value
        with pytest.raises(StatisticsError, match=f"'{needed}' .* is not finite for experts 5"):
            method.plan({**statistics, needed: quantities}, make_target(3))


def permuted(statistics, order):
    def move(name, value):
        if name in PER_TASK:
            return value[:, order]
        return value[order][:, order] if name in PAIRS else value[order]

    return {
        name: {key: move(name, value) for key, value in quantities.items()} for name, quantities in statistics.items()
    }


def test_permuting_experts_permutes_the_result(method, make_statistics, make_target, make_weights, make_sample):
    if not (method.needs or method.needs_sample):
        pytest.skip("does not look at the experts")
    order = torch.tensor([3, 7, 0, 5, 2, 6, 1, 4])
    weights, statistics, sample, target = make_weights(), make_statistics(), make_sample(), make_target(3)
    plain = combine_experts(weights, method.plan_with_sample(statistics, target, weights, sample))
    elsewhere, shuffled = weights.select(order), dataclasses.replace(sample, logits_NE=sample.logits_NE[:, order])
    decision = method.plan_with_sample(permuted(statistics, order), target, elsewhere, shuffled)
    moved = combine_experts(elsewhere, decision)

    def rows(layer):
        flat = torch.cat([tensor.reshape(len(tensor), -1) for tensor in layer.tensors().values()], 1)
        return torch.stack(sorted(flat, key=lambda row: row[0].item()))

    torch.testing.assert_close(rows(moved), rows(plain), rtol=1e-5, atol=1e-6)
