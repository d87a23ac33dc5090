"""Where experts live when a layer is spread over several devices (expert parallelism).

A layer has P physical slots, equally many on every device and in order: slot s lies on device s // (P / devices). A
placement says which expert each slot holds; an expert with several slots (replicas) shares its tokens evenly among
them. What counts is the device with the largest load, because the others wait for it.

Source: EPLB, the expert parallelism load balancer published with DeepSeek-V3 (arXiv 2412.19437, section 3.4);
`place_experts` gives the result that its documentation prints.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moetools.errors import UserError
from moetools.methods.base import ExpertDecision, ExpertMethod, ExpertTarget, LayerStatistics
from moetools.methods.prune.base import keep_decision


def place_experts(
    load_E: Sequence[float], *, devices: int, slots: int | None = None, groups: int = 1, nodes: int = 1
) -> list[int]:
    """The expert of every slot of one layer, so that the largest load of a device is small.

    Where the router groups can be dealt out to the nodes (groups % nodes == 0), they are packed into nodes first, slots
    are then given to experts inside each node, and packed into its devices (hierarchical). Else groups and nodes are
    disregarded (global). Every packing is greedy: the heaviest first, each into the lightest pack that has room.

    Args:
        load_E: tokens of every expert, in any unit.
        slots: P; one for each expert if not given.
        groups: router groups of consecutive experts.

    Raises:
        UserError: devices, nodes, slots or groups that do not divide, or fewer slots than experts.
    """
    experts = len(load_E)
    slots = experts if slots is None else slots
    _check(experts, slots, devices, groups, nodes)
    if groups % nodes:
        groups, nodes = 1, 1
    size = experts // groups
    group_load = [sum(load_E[group * size : (group + 1) * size]) for group in range(groups)]
    placed: list[int] = []
    for node in _packed(group_load, nodes):
        members = [group * size + member for group in node for member in range(size)]
        held = _with_replicas([load_E[expert] for expert in members], slots // nodes)
        copies = [held.count(member) for member in range(len(members))]
        shares = [load_E[members[member]] / copies[member] for member in held]
        for device in _packed(shares, devices // nodes):
            placed += [members[held[slot]] for slot in device]
    return placed


def _check(experts: int, slots: int, devices: int, groups: int, nodes: int) -> None:
    if min(devices, nodes) < 1 or devices % nodes:
        raise UserError(f"{devices} devices do not form {nodes} equal nodes", hint="`nodes` divides `devices`")
    if experts % groups:
        raise UserError(f"{experts} experts do not form {groups} equal router groups")
    if slots < experts or slots % devices:
        more = -experts % devices
        raise UserError(
            f"{experts} experts and {slots - experts} replicas do not fill {devices} devices evenly",
            hint=f"`replicas={more}`, or {more} and a multiple of {devices}",
        )


def _packed(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Items of every pack, equally many in each: the heaviest item first, into the lightest pack with room."""
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        lightest = min((pack for pack in range(packs) if len(found[pack]) < room), key=lambda pack: total[pack])
        found[lightest].append(item)
        total[lightest] += weights[item]
    return found


def _with_replicas(load_E: Sequence[float], slots: int) -> list[int]:
    """The expert of every slot: each has one, and every further slot goes to the one with the largest load a slot."""
    held, copies = list(range(len(load_E))), [1] * len(load_E)
    while len(held) < slots:
        busiest = max(range(len(load_E)), key=lambda expert: load_E[expert] / copies[expert])
        held.append(busiest)
        copies[busiest] += 1
    return held


def device_shares(
    load_E: Shaped[Tensor, "E"], expert_P: Sequence[int], devices: int
) -> tuple[Float[Tensor, "E devices"], Float[Tensor, "devices"]]:
    """Which part of every expert's tokens each device takes, and each device's load."""
    expert = torch.tensor(expert_P)
    copies_E = torch.bincount(expert, minlength=len(load_E)).double()
    part = torch.zeros(len(load_E), devices, dtype=torch.float64)
    device = torch.arange(len(expert_P)) // (len(expert_P) // devices)
    part.index_put_((expert, device), 1 / copies_E[expert], accumulate=True)
    return part, load_E.double() @ part


def imbalance(device_load: Float[Tensor, "devices"]) -> float:
    """Largest load of a device over the mean; 1 is balanced, and the layer takes that many times as long."""
    total = float(device_load.sum())
    return float(device_load.max()) * len(device_load) / total if total else 1.0


def devices_per_token(
    chosen_E: Int[Tensor, "E"], pairs_EE: Int[Tensor, "E E"], tokens: int, part_ED: Float[Tensor, "E devices"]
) -> float:
    """On how many devices, on average and at least, a token's experts lie: what all-to-all sends of it.

    For every device, with S1 = expected number of a token's slots there and S2 = expected number of pairs of them, a
    token visits it with probability at least 2 S1 / (j + 1) - 2 S2 / (j (j + 1)), j = 1 + floor(2 S2 / S1); exact for
    two experts a token. Replicas are taken to be chosen independently and evenly.

    Args:
        chosen_E: N_i, tokens that chose expert i.
        pairs_EE: N_ij, tokens that chose both; zero diagonal.
        part_ED: `device_shares`.

    Source: the sharpest bound by two moments, Dawson and Sankoff (Proc. AMS 18, 1967).
    """
    if not tokens:
        return 0.0
    first = (chosen_E.double() @ part_ED) / tokens
    second = torch.einsum("id,ij,jd->d", part_ED, pairs_EE.double(), part_ED) / (2 * tokens)
    step = 1 + torch.floor(2 * second / first.clamp(min=1e-300))
    bound = 2 * first / (step + 1) - 2 * second / (step * (step + 1))
    return float(bound.clamp(0, 1).sum())


class Reordered(ExpertMethod):
    """Keeps every expert and puts them, with their router rows, into another order; the layer computes the same.

    Args:
        layers: layer -> the expert of every place. Router groups stay together, as the router addresses them by place.
    """

    name = "reordered"
    router = "centroid"

    def __init__(self, layers: Mapping[int, Sequence[int]]) -> None:
        self._layers = layers

    def plan(self, statistics: LayerStatistics, target: ExpertTarget) -> ExpertDecision:  # noqa: ARG002
        order, size = self._layers[target.layer], target.keep_per_group
        assert sorted(order) == list(range(target.num_experts)), "every expert once"
        for start in range(0, len(order), size):
            assert len({expert // size for expert in order[start : start + size]}) == 1, "router groups stay together"
        return keep_decision(order, {})
