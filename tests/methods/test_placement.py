"""Placements against the published example of EPLB, counting by hand, and brute force."""

import itertools

import pytest
import torch

from moetools.errors import UserError
from moetools.methods.placement import device_shares, devices_per_token, imbalance, place_experts

# The example and the result in the documentation of EPLB (github.com/deepseek-ai/EPLB).
EXAMPLE = {
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86): (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27): (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
}


@pytest.mark.parametrize("load", EXAMPLE)
def test_the_published_example(load):
    assert place_experts([float(one) for one in load], devices=8, slots=16, groups=4, nodes=2) == list(EXAMPLE[load])


@pytest.mark.parametrize(("experts", "slots", "groups", "nodes", "devices"), [(8, 8, 1, 1, 4), (12, 16, 4, 2, 8),
    (12, 16, 3, 2, 4), (16, 32, 8, 4, 8), (6, 6, 1, 1, 6)])  # fmt: skip
def test_every_slot_is_filled_and_no_expert_is_left_out(experts, slots, groups, nodes, devices):
    load = torch.rand(experts, generator=torch.Generator().manual_seed(slots)).tolist()
    placed = place_experts(load, devices=devices, slots=slots, groups=groups, nodes=nodes)
    assert len(placed) == slots
    assert set(placed) == set(range(experts))
    if groups % nodes == 0:
        size, node = experts // groups, slots // nodes
        held = [{expert // size for expert in placed[n * node : (n + 1) * node]} for n in range(nodes)]
        assert not set.intersection(*held) or nodes == 1, "a router group lies on one node"


def test_greedy_is_close_to_the_best_order():
    load = torch.rand(8, generator=torch.Generator().manual_seed(3)).double()
    _, found = device_shares(load, place_experts(load.tolist(), devices=4), 4)
    best = min(
        imbalance(device_shares(load, order, 4)[1])
        for order in itertools.permutations(range(8))
        if all(order[i] < order[i + 1] for i in (0, 2, 4, 6)) and order[0] < order[2] < order[4] < order[6]
    )
    _, linear = device_shares(load, range(8), 4)
    assert best <= imbalance(found) <= 1.1 * best
    assert imbalance(found) < imbalance(linear)


def test_replicas_share_their_tokens():
    part, load = device_shares(torch.tensor([6.0, 2.0]), [0, 1, 0, 0], 2)
    assert part.tolist() == [[1 / 3, 2 / 3], [1, 0]]
    assert load.tolist() == [4, 4]
    assert imbalance(load) == 1


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_devices_a_token_visits(top_k):
    generator = torch.Generator().manual_seed(top_k)
    chosen_TK = torch.rand(400, 8, generator=generator).topk(top_k, dim=1).indices
    chosen_TE = torch.zeros(400, 8).scatter_(1, chosen_TK, 1)
    pairs = (chosen_TE.T @ chosen_TE).long().fill_diagonal_(0)
    order = [3, 1, 0, 2, 7, 4, 5, 6]
    part, _ = device_shares(torch.ones(8), order, 4)
    device_of = {expert: place // 2 for place, expert in enumerate(order)}
    true = sum(len({device_of[e] for e in row}) for row in chosen_TK.tolist()) / 400
    found = devices_per_token(chosen_TE.sum(0).long(), pairs, 400, part)
    # Two experts a device: no token has more than two slots on one, and two moments say everything.
    assert found == pytest.approx(true)


def test_devices_a_token_visits_are_never_overstated():
    chosen_TK = torch.rand(300, 8, generator=torch.Generator().manual_seed(9)).topk(4, dim=1).indices
    chosen_TE = torch.zeros(300, 8).scatter_(1, chosen_TK, 1)
    pairs = (chosen_TE.T @ chosen_TE).long().fill_diagonal_(0)
    part, _ = device_shares(torch.ones(8), range(8), 2)
    true = sum(len({expert // 4 for expert in row}) for row in chosen_TK.tolist()) / 300
    assert 0.8 * true < devices_per_token(chosen_TE.sum(0).long(), pairs, 300, part) <= true
    assert devices_per_token(torch.zeros(8).long(), torch.zeros(8, 8).long(), 0, part) == 0


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"devices": 3}, "replicas=1"),
        ({"devices": 4, "slots": 6}, "replicas=0"),
        ({"devices": 4, "nodes": 3}, "divides"),
        ({"devices": 0}, "divides"),
    ],
)
def test_what_cannot_be_placed(options, hint):
    with pytest.raises(UserError) as found:
        place_experts([1.0] * 8, **options)
    assert hint in str(found.value.hint)
