"""A placement of every MoE layer, made from some sequences and judged on others.

Letters as in `moetools.shapes`; P physical slots of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moetools.errors import UserError
from moetools.forward.calibrate import ModelStatistics
from moetools.methods.placement import device_shares, devices_per_token, imbalance, place_experts
from moetools.pipeline.table import Table

NEEDS = ("coactivation", "sequence_load")
"""Statistics a placement is made from."""
_HELD_OUT_EVERY = 5


def check_order(num_experts: int, groups: int, devices: int) -> None:
    """Whether devices that hold consecutive experts can hold equally many, with router groups together.

    Raises:
        UserError: with numbers of devices that can.
    """
    if devices < 1 or num_experts % devices:
        raise UserError(
            f"{num_experts} experts cannot be dealt out evenly to {devices} devices",
            hint=f"a divisor of {num_experts} as `devices`",
        )
    if groups % devices and devices % groups:
        raise UserError(
            f"{groups} router groups cannot be dealt out evenly to {devices} devices",
            hint=f"a divisor or a multiple of {groups} as `devices`",
        )


def check_sequences(sequences: int) -> None:
    """Raises UserError where there are too few sequences to judge a placement on some that it was not made from."""
    if sequences < _HELD_OUT_EVERY:
        raise UserError(
            f"a placement is judged on sequences it was not made from, and there are {sequences}",
            hint=f"at least {_HELD_OUT_EVERY}: more text, or a smaller `seq_len`",
        )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a placement of one layer costs on the held-out sequences.

    Attributes:
        imbalance: largest load of a device over the mean; 1 is balanced.
        devices_per_token: how many devices a token's experts lie on, at least, over all text.
    """

    imbalance: float
    devices_per_token: float


@dataclass(frozen=True, kw_only=True)
class LayerPlacement:
    """One MoE layer.

    Attributes:
        experts: the expert of every slot.
        planned, linear: this placement, and experts in their own order without replicas.
    """

    index: int
    experts: list[int]
    planned: Judged
    linear: Judged | None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All MoE layers.

    Attributes:
        replicas: slots beyond one for each expert.
        held_out, sequences: on how many of all sequences it was judged.
    """

    devices: int
    nodes: int
    replicas: int
    held_out: int
    sequences: int
    layers: tuple[LayerPlacement, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def location(self, num_layers: int, num_experts: int) -> dict[str, Any]:
        """What SGLang's `--init-expert-location` reads: the expert of every slot of all decoder layers, dense ones too.

        A layer without experts gets a linear row of the same length.
        """
        placed = {layer.index: layer.experts for layer in self.layers}
        linear = [slot % num_experts for slot in range(num_experts + self.replicas)]
        return {"physical_to_logical_map": [placed.get(index, linear) for index in range(num_layers)]}

    def table(self) -> Table:
        """One row per layer, and their mean."""
        rows = [[str(layer.index), *_cells([layer])] for layer in self.layers]
        if len(rows) > 1:
            rows.append(["mean", *_cells(self.layers)])
        places = f"{self.devices} devices" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")
        note = (
            f"max/mean: largest load of a device over the mean, on {self.held_out} of {self.sequences} sequences that "
            "the plan was not made from; devices a token: at least so many hold its experts; linear: as they are now"
        )
        return Table(
            title=f"placement on {places}" + (f", {self.replicas} replicas" if self.replicas else ""),
            columns=["layer", "linear max/mean", "planned max/mean", "linear devices a token", "planned"],
            rows=rows,
            note=note,
        )


def _cells(layers: Sequence[LayerPlacement]) -> list[str]:
    linear = [layer.linear for layer in layers if layer.linear is not None]
    planned = [layer.planned for layer in layers]

    def mean(values: Sequence[float], digits: int) -> str:
        return f"{sum(values) / len(values):.{digits}f}" if values else "n/a"

    return [
        *(mean([judged.imbalance for judged in found], 3) for found in (linear, planned)),
        *(mean([judged.devices_per_token for judged in found], 2) for found in (linear, planned)),
    ]


def plan_placement(
    statistics: ModelStatistics, *, devices: int, nodes: int = 1, replicas: int = 0, groups: int = 1
) -> Placement:
    """The placement of every layer by EPLB (`methods.placement`), judged on every fifth sequence.

    Raises:
        UserError: experts and replicas do not fill the devices evenly, or there are too few sequences to judge it.
    """

    def place(load_E: Sequence[float]) -> list[int]:
        return place_experts(load_E, devices=devices, slots=len(load_E) + replicas, groups=groups, nodes=nodes)

    return _judged(statistics, place, devices, nodes, replicas)


def plan_order(statistics: ModelStatistics, *, devices: int, groups: int = 1) -> Placement:
    """The best order of the experts for devices that hold consecutive ones, equally many.

    Router groups stay together: whole groups on a device, or several devices for a group.

    Raises:
        UserError: see `check_order` and `check_sequences`.
    """
    nodes = devices if groups % devices == 0 else groups

    def place(load_E: Sequence[float]) -> list[int]:
        return place_experts(load_E, devices=devices, groups=groups, nodes=nodes if groups > 1 else 1)

    return _judged(statistics, place, devices, 1, 0)


def _judged(
    statistics: ModelStatistics, place: Callable[[Sequence[float]], list[int]], devices: int, nodes: int, replicas: int
) -> Placement:
    sequences = statistics.shape.num_sequences
    check_sequences(sequences)
    layers = tuple(_layer(index, statistics.finalized(index), place, devices) for index in statistics.layers)
    held_out = sequences // _HELD_OUT_EVERY
    return Placement(
        devices=devices, nodes=nodes, replicas=replicas, held_out=held_out, sequences=sequences, layers=layers
    )


def _layer(
    index: int,
    quantities: Mapping[str, Mapping[str, Tensor]],
    place: Callable[[Sequence[float]], list[int]],
    devices: int,
) -> LayerPlacement:
    slots_SE, pairs = quantities["sequence_load"]["slots"], quantities["coactivation"]
    unseen_E = slots_SE[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY].sum(0)
    experts = place((slots_SE.sum(0) - unseen_E).double().tolist())

    def judged(expert_P: Sequence[int]) -> Judged:
        part_ED, load = device_shares(unseen_E, expert_P, devices)
        visited = devices_per_token(pairs["chosen"], pairs["pairs"], int(pairs["tokens"]), part_ED)
        return Judged(imbalance=imbalance(load), devices_per_token=visited)

    linear = range(len(unseen_E))
    even = len(unseen_E) % devices == 0
    return LayerPlacement(
        index=index, experts=experts, planned=judged(experts), linear=judged(linear) if even else None
    )
