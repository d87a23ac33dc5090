"""NAEE against block outputs computed densely for every subset there is."""

import itertools
from dataclasses import replace

import pytest
import torch

from moetools.errors import StatisticsError, UserError
from moetools.methods.prune import naee
from moetools.methods.prune.naee import NaeePrune, SubsetSearch, choose_subset, output_grams

METHOD = NaeePrune()


def softmax_unnormalised(logits, kept):
    """Softmax over all experts that are there, then the two best as they are: dropping one changes all weights."""
    weight, index = logits.softmax(1).topk(min(2, logits.shape[1]), dim=1)
    return index, weight


BIAS = torch.linspace(-1, 1, 8)


def sigmoid_with_correction(logits, kept):
    """Chosen by sigmoid plus correction bias, weighted by sigmoid alone; the kept experts say whose bias counts."""
    score = logits.sigmoid()
    index = (score + BIAS[kept]).topk(min(3, len(kept)), dim=1).indices
    weight = score.gather(1, index)
    return index, weight / weight.sum(1, keepdim=True)


def group_limited(logits, kept):
    """Two router groups by position; only the one with the better expert is used, two of its experts."""
    grouped = logits.unflatten(1, (2, -1))
    best = grouped.amax(2).argmax(1)
    open_groups = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best[:, None], True)
    masked = grouped.masked_fill(~open_groups[:, :, None], float("-inf")).flatten(1)
    weight, index = masked.topk(min(2, grouped.shape[2]), dim=1)
    return index, weight.softmax(1)


def dense_output(weights, sample, kept):
    """Z_C [N, D] in fp64: every kept expert on every token, times its weight in the routing among the kept."""
    index, weight = sample.route(sample.logits_NE[:, kept], torch.tensor(kept))
    total = 0
    for column, expert in enumerate(kept):
        x = sample.hidden_ND.double()
        gate, up = weights.gate_EFD[expert].double(), weights.up_EFD[expert].double()
        inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        output = inner @ weights.down_EDF[expert].double().T + weights.down_bias_ED[expert].double()
        total += ((index == column) * weight.double()).sum(1, keepdim=True) * output
    return total


def dense_errors(weights, sample, keep, groups=1):
    """||Z - Z_C||_F of every subset that keeps equally many experts of each group."""
    whole = dense_output(weights, sample, list(range(8)))
    size = 8 // groups
    return {
        kept: (whole - dense_output(weights, sample, list(kept))).norm().item()
        for kept in itertools.combinations(range(8), keep)
        if all(sum(e // size == group for e in kept) == keep // groups for group in range(groups))
    }


def kept_of(decision):
    return tuple(cluster[0] for cluster in decision.clusters)


ROUTES = [softmax_unnormalised, sigmoid_with_correction]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("keep", [1, 3, 6, 7])
def test_naee_finds_the_best_subset(make_weights, make_sample, make_target, route, keep):
    weights, sample = make_weights(), make_sample(route=route)
    decision = METHOD.plan_with_sample({}, make_target(keep), weights, sample)
    errors = dense_errors(weights, sample, keep)
    best = min(errors, key=errors.get)
    assert kept_of(decision) == best
    whole = dense_output(weights, sample, list(range(8))).norm().item()
    assert decision.details["error"] == pytest.approx(errors[best] / whole, rel=1e-4)
    assert decision.details["exhaustive"] is True


@pytest.mark.parametrize("keep", [2, 4, 6])
def test_naee_keeps_equally_many_of_each_group(make_weights, make_sample, make_target, keep):
    weights, sample = make_weights(), make_sample(route=group_limited)
    decision = METHOD.plan_with_sample({}, make_target(keep, groups=2), weights, sample)
    errors = dense_errors(weights, sample, keep, groups=2)
    assert kept_of(decision) == min(errors, key=errors.get)


def test_errors_of_subsets_are_those_of_the_dense_block(make_weights, make_sample):
    weights, sample = make_weights(), make_sample(route=sigmoid_with_correction)
    search = SubsetSearch(output_grams(weights, sample), sample.logits_NE, sample.route)
    for kept, error in dense_errors(weights, sample, 4).items():
        assert search.squared_error(kept) == pytest.approx(error**2, rel=1e-4)
    assert search.squared_error(range(8)) < 1e-8


def test_grams_do_not_depend_on_the_runs(make_weights, make_sample, monkeypatch):
    weights, sample = make_weights(), make_sample()
    output_NED = torch.stack([sample.output(weights, expert) for expert in range(8)], 1)
    expected = torch.einsum("ned,nfd->nef", output_NED, output_NED)
    monkeypatch.setattr(naee, "_CHUNK_BYTES", 7 * 4 * 8 * 5)
    torch.testing.assert_close(output_grams(weights, sample), expected, rtol=1e-4, atol=1e-4)


def test_sample_computes_experts_with_biases_and_without_gate(make_weights, make_sample):
    sample, plain = make_sample(), make_weights()
    generator = torch.Generator().manual_seed(9)
    biases = {
        "gate_bias_EF": torch.randn(8, 4, generator=generator),
        "up_bias_EF": torch.randn(8, 4, generator=generator),
    }
    weights, x = replace(plain, **biases), sample.hidden_ND
    gate = x @ plain.gate_EFD[3].T + biases["gate_bias_EF"][3]
    up = x @ plain.up_EFD[3].T + biases["up_bias_EF"][3]
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(sample.intermediate(weights, 3), expected)
    output = expected @ plain.down_EDF[3].T + plain.down_bias_ED[3]
    torch.testing.assert_close(sample.output(weights, 3), output)
    ungated = replace(plain, gate_EFD=None)
    torch.testing.assert_close(sample.intermediate(ungated, 3), (x @ plain.up_EFD[3].T).clamp(min=0))


def beam_by_definition(search, keep, width, experts=8):
    """Backward elimination in which every set one smaller than any set carried along is tried."""
    beam = [tuple(range(experts))]
    while len(beam[0]) > keep:
        smaller = {tuple(e for e in kept if e != gone) for kept in beam for gone in kept}
        beam = sorted(smaller, key=lambda kept: (search.squared_error(kept), kept))[:width]
    return list(beam[0])


@pytest.mark.parametrize(("limit", "width"), [(1, 1), (100, 2), (251, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_beam_search_where_there_are_too_many_subsets(make_weights, make_sample, monkeypatch, seed, limit, width):
    # 10 -> 5: 252 subsets; elimination takes 10 + 9 + 8 + 7 + 6 = 40 tries for every set it carries along.
    weights = make_weights(experts=10, seed=seed)
    sample = make_sample(experts=10, seed=seed, route=softmax_unnormalised)
    search = SubsetSearch(output_grams(weights, sample), sample.logits_NE, sample.route)
    expected = beam_by_definition(search, 5, width, experts=10)
    monkeypatch.setattr(naee, "MAX_EVALUATIONS", limit)
    search.tried = 0
    assert choose_subset(search, 5, [range(10)]) == expected
    assert search.tried <= width * 40
    assert width > 1 or search.tried == 40


def test_beam_search_shrinks_groups_together(make_weights, make_sample, make_target, monkeypatch):
    weights, sample = make_weights(), make_sample(route=group_limited)
    monkeypatch.setattr(naee, "MAX_EVALUATIONS", 1)
    decision = METHOD.plan_with_sample({}, make_target(4, groups=2), weights, sample)
    assert [expert // 4 for expert in kept_of(decision)] == [0, 0, 1, 1]
    assert decision.details["exhaustive"] is False
    errors = sorted(dense_errors(weights, sample, 4, groups=2).values())
    whole = dense_output(weights, sample, list(range(8))).norm().item()
    # Not the optimum by construction, but far from chance: within the best third of the 36 subsets.
    assert decision.details["error"] * whole <= errors[12]


def test_a_duplicated_expert_is_dropped_first(make_weights, make_sample, make_target):
    # Experts 2 and 6 are twins with one router row between them: either stands in for both.
    def route_top1(logits, kept):
        return logits.argmax(1, keepdim=True), torch.ones(len(logits), 1)

    weights = make_weights().select(torch.tensor([0, 1, 2, 3, 4, 5, 2, 7]))
    sample = make_sample(route=route_top1)
    sample.logits_NE[:, 6] = sample.logits_NE[:, 2] - 1e-3
    decision = METHOD.plan_with_sample({}, make_target(7), weights, sample)
    assert decision.details["error"] < 1e-6
    assert kept_of(decision) == (0, 1, 2, 3, 4, 5, 7)


def test_statistics_alone_are_not_enough(make_target):
    with pytest.raises(UserError, match="layer 3: naee compares block outputs") as caught:
        METHOD.plan({}, make_target(3))
    assert caught.value.hint == "give calibration data"


def test_a_sample_of_another_layer_is_refused(make_weights, make_sample, make_target):
    with pytest.raises(StatisticsError, match="the sample is for 16 experts, the layer has 8"):
        METHOD.plan_with_sample({}, make_target(3), make_weights(), make_sample(experts=16))


@pytest.mark.parametrize("field", ["hidden_ND", "logits_NE"])
def test_a_sample_that_is_not_finite_is_refused(make_weights, make_sample, make_target, field):
    sample = make_sample()
    getattr(sample, field)[3, 2] = float("inf")
    with pytest.raises(StatisticsError, match=r"layer 3: .* not finite"):
        METHOD.plan_with_sample({}, make_target(3), make_weights(), sample)
