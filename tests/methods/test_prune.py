"""Pruning against scores one can read, and the checks on targets and explicit lists."""

import pytest
import torch

from moetools.errors import StatisticsError, UserError
from moetools.methods.base import combine_experts
from moetools.methods.prune.base import keep_exactly, super_experts
from moetools.methods.prune.ean import EanPrune
from moetools.methods.prune.easy_ep import EasyEpPrune
from moetools.methods.prune.frequency import FrequencyPrune
from moetools.methods.prune.gate_mass import GateMassPrune
from moetools.methods.prune.random import RandomPrune
from moetools.methods.prune.reap import ReapPrune


def kept(decision):
    return [cluster[0] for cluster in decision.clusters]


def reap(*scores):
    return {"reap": {"saliency": torch.tensor(scores)}}


def test_keeps_the_highest_in_ascending_order(make_target):
    statistics = reap(0.1, 0.9, 0.0, 0.5, 0.7, 0.2, 0.3, 0.8)
    decision = ReapPrune().plan(statistics, make_target(4))
    assert kept(decision) == [1, 3, 4, 7]
    assert decision.details["scores"] == pytest.approx([0.1, 0.9, 0.0, 0.5, 0.7, 0.2, 0.3, 0.8])


def test_keeps_the_highest_of_every_group(make_target):
    statistics = reap(0.1, 0.9, 0.0, 0.5, 10.7, 10.2, 10.3, 10.8)
    assert kept(ReapPrune().plan(statistics, make_target(4, groups=2))) == [1, 3, 4, 7]
    assert kept(ReapPrune().plan(statistics, make_target(4, groups=4))) == [1, 3, 4, 7]


def test_ties_go_to_the_lower_index(make_target):
    assert kept(ReapPrune().plan(reap(*[0.5] * 8), make_target(3))) == [0, 1, 2]


def test_frequency_pools_tasks_by_slots(make_target):
    slots = torch.tensor([[900, 1, 0, 0, 0, 0, 0, 99], [0, 300, 500, 0, 0, 0, 0, 200]])
    decision = FrequencyPrune().plan({"load": {"slots": slots}}, make_target(3))
    assert kept(decision) == [0, 1, 2]
    assert decision.details["scores"][:3] == pytest.approx([0.45, 0.1505, 0.25])


def test_frequency_without_any_tokens_keeps_the_first(make_target):
    statistics = {"load": {"slots": torch.zeros(1, 8, dtype=torch.int64)}}
    assert kept(FrequencyPrune().plan(statistics, make_target(2))) == [0, 1]


def test_ean_reads_the_sum(make_target):
    statistics = {"ean": {"norm": torch.tensor([5.0, 1.0, 2.0, 9.0, 3.0, 0.0, 4.0, 8.0])}}
    assert kept(EanPrune().plan(statistics, make_target(3))) == [0, 3, 7]


def test_random_depends_on_seed_and_layer_only(make_target):
    def draw(**where):
        return tuple(kept(RandomPrune().plan({}, make_target(32, experts=64, **where))))

    assert draw(seed=1, layer=0) == draw(seed=1, layer=0)
    draws = [draw(seed=seed, layer=layer) for seed in range(4) for layer in range(4)]
    assert len(set(draws)) == 16


def test_random_is_uniform(make_target):
    counts = torch.zeros(8)
    for seed in range(400):
        counts[kept(RandomPrune().plan({}, make_target(4, seed=seed)))] += 1
    # Binomial(400, 1/2): standard deviation 10; all eight stay within five of them.
    assert (counts - 200).abs().max() < 50


@pytest.mark.parametrize(
    ("keep", "groups", "message"),
    [
        (0, 1, "cannot keep 0 experts; legal: 1 to 8"),
        (9, 1, "cannot keep 9 experts; legal: 1 to 8"),
        (3, 2, "cannot keep 3 experts in 2 router groups; legal: multiples of 2"),
        (3, 3, "8 experts do not form 3 equal router groups"),
    ],
)
def test_impossible_targets_are_refused(make_target, keep, groups, message):
    with pytest.raises(UserError, match=f"layer 3: {message}"):
        make_target(keep, groups=groups)


def test_hint_names_the_nearest_legal_numbers(make_target):
    with pytest.raises(UserError) as caught:
        make_target(3, groups=2)
    assert caught.value.hint == "keep 2 or 4 experts"
    with pytest.raises(UserError) as caught:
        make_target(1, groups=4)
    assert caught.value.hint == "keep 4 experts"


def test_keep_exactly(make_target, make_weights):
    decision = keep_exactly([6, 0, 5], make_target(3))
    assert decision.clusters == ((0,), (5,), (6,))
    weights = make_weights()
    result = combine_experts(weights, decision)
    assert torch.equal(result.up_EFD, weights.up_EFD[[0, 5, 6]])
    assert torch.equal(result.router_ED, weights.router_ED[[0, 5, 6]])
    assert torch.equal(result.correction_bias_E, weights.correction_bias_E[[0, 5, 6]])


@pytest.mark.parametrize(
    ("listed", "keep", "groups", "message"),
    [
        ([1, 1, 2], 3, 1, "expert 1 is listed more than once"),
        ([1, 8, 2], 3, 1, "no expert 8; legal: 0 to 7"),
        ([-1, 3, 2], 3, 1, "no expert -1; legal: 0 to 7"),
        ([1, 2], 3, 1, "2 experts listed, 3 wanted"),
        ([0, 1, 2, 7], 4, 2, "the router groups would keep 3, 1 experts"),
    ],
)
def test_impossible_lists_are_refused(make_target, listed, keep, groups, message):
    with pytest.raises(UserError, match=f"layer 3: {message}"):
        keep_exactly(listed, make_target(keep, groups=groups))


def test_gate_mass_pools_tasks(make_target):
    mass = torch.tensor([[5.0, 1, 0, 0, 0, 0, 0, 2], [0, 3, 4.5, 0, 0, 0, 0, 2]], dtype=torch.float64)
    decision = GateMassPrune().plan({"router": {"gate_mass": mass}}, make_target(3))
    assert kept(decision) == [0, 1, 2]
    assert decision.details["scores"] == [5, 4, 4.5, 0, 0, 0, 0, 4]


def test_easy_ep_reads_its_score(make_target):
    statistics = {"easy_ep": {"score": torch.tensor([5.0, 1.0, 2.0, 9.0, 3.0, 0.0, 4.0, 8.0])}}
    assert kept(EasyEpPrune().plan(statistics, make_target(3))) == [0, 3, 7]


RISING = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def test_protected_experts_stay_whatever_their_score(make_target):
    decision = ReapPrune().plan(reap(*RISING), make_target(3, protected=(0,)))
    assert kept(decision) == [0, 6, 7]
    assert decision.details["protected"] == [0]
    assert decision.details["protected_dropped"] == []


def test_more_protected_experts_than_places(make_target):
    decision = ReapPrune().plan(reap(*RISING), make_target(2, protected=(2, 0, 1)))
    assert kept(decision) == [1, 2]
    assert decision.details["protected"] == [0, 1, 2]
    assert decision.details["protected_dropped"] == [0]


def test_protection_works_group_by_group(make_target):
    decision = ReapPrune().plan(reap(*RISING), make_target(4, groups=2, protected=(0, 1, 2)))
    assert kept(decision) == [1, 2, 6, 7]
    assert decision.details["protected_dropped"] == [0]


def test_without_protection_nothing_is_said_of_it(make_target):
    assert set(ReapPrune().plan(reap(*RISING), make_target(2)).details) == {"scores"}


@pytest.mark.parametrize("expert", [-1, 8])
def test_protecting_an_expert_that_does_not_exist(make_target, expert):
    with pytest.raises(UserError, match=f"layer 3: cannot protect expert {expert}; legal: 0 to 7"):
        make_target(3, protected=(1, expert))


def test_super_experts_stand_out_of_the_whole_model():
    generator = torch.Generator().manual_seed(0)
    peaks = {layer: torch.rand(64, generator=generator) for layer in (1, 2, 5, 9)}
    peaks[2][17], peaks[2][3], peaks[9][0] = 500.0, 60.0, 52.0
    # P99.5 of 256 peaks lies 0.725 of the way from the third to the second largest: 52 + .725 * 8 = 57.8.
    assert super_experts(peaks) == {1: (), 2: (3, 17), 5: (), 9: ()}


def test_super_experts_reach_a_tenth_of_the_largest():
    # With 1,000 peaks P99.5 is about 1; the largest is 1,000, so the tenth of it decides.
    peaks = {0: torch.ones(500), 1: torch.ones(500)}
    peaks[0][7], peaks[1][8], peaks[1][9] = 1000.0, 99.0, 101.0
    assert super_experts(peaks) == {0: (7,), 1: (9,)}


def test_equal_peaks_protect_nobody():
    assert super_experts({0: torch.ones(8), 1: torch.ones(8)}) == {0: (), 1: ()}
    assert super_experts({}) == {}


def test_peaks_that_are_not_finite_are_refused():
    with pytest.raises(StatisticsError, match=r"layer 4: statistic 'max_activation' .* not finite"):
        super_experts({1: torch.ones(8), 4: torch.tensor([1.0, float("inf")])})
