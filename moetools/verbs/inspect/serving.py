"""What routing would mean for other ways to serve it: capacity, expert choice, rounding of the router."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetools.pipeline.table import Table
from moetools.statistics.base import State
from moetools.statistics.margin import BOUNDS

FACTORS = tuple(step / 4 for step in range(2, 17))
"""Capacity factors of the curve: 0.5 to 4."""
_STEP = 0.05
_DROPS_ALLOWED = 0.01
_BATCHES = (1, 8, 64)
_SHOWN = (1.0, 1.25, 2.0)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Slots dropped where every expert takes capacity = ceil(T K / E * factor) tokens of a batch of T, and no more.

    Attributes:
        sequences: of a batch: consecutive ones of the text, the last batch may have fewer.
        factors, dropped: capacity factors and the share of all slots that each drops.
        enough: the least factor, in steps of 0.05, that drops less than 1 % of the slots.
    """

    sequences: int
    factors: list[float]
    dropped: list[float]
    enough: float


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How close the router's choices are, over all tasks; shares of tokens.

    Attributes:
        below: logit difference -> tokens whose last chosen and first other expert differ by less.
        rounding: tokens whose choice rounding of the logits to bfloat16 may turn over.
        negative: tokens that were decided by more than logits (correction bias, groups).
    """

    below: Mapping[float, float]
    rounding: float
    negative: float


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One layer.

    Attributes:
        capacity: by batches of 1, 8 and 64 sequences, as far as there are so many.
        kept, orphans: share of the model's slots that expert-choice routing per sequence would have as well, and of
            tokens that no expert would take.
    """

    capacity: list[Capacity]
    choices: Choices
    kept: float
    orphans: float


def serving(quantities: Mapping[str, State]) -> Serving:
    """From "sequence_load", "margin" and "expert_choice" of a layer."""
    slots_SE, chosen = quantities["sequence_load"]["slots"], quantities["expert_choice"]
    sizes = [size for size in _BATCHES if size <= len(slots_SE)]
    return Serving(
        capacity=[capacity(slots_SE, size) for size in sizes],
        choices=_choices(quantities["margin"]),
        kept=_share(chosen["kept"], chosen["slots"]),
        orphans=_share(chosen["orphans"], chosen["tokens"]),
    )


def capacity(slots_SE: Tensor, sequences: int) -> Capacity:
    """The curve for batches of so many sequences, from the slots of every sequence and expert.

    Source: expert capacity, Switch Transformer (arXiv 2101.03961, section 2.2), eq. 3.
    """
    batch_S = torch.arange(len(slots_SE)) // sequences
    slots_BE = slots_SE.new_zeros(int(batch_S[-1]) + 1, slots_SE.shape[1]).index_add_(0, batch_S, slots_SE)
    total = max(1, int(slots_BE.sum()))

    def dropped(factor: float) -> float:
        room_B1 = (slots_BE.sum(1, keepdim=True).double() * factor / slots_BE.shape[1] - 1e-9).ceil().long()
        return int((slots_BE - room_B1).clamp(min=0).sum()) / total

    low, high = 0, math.ceil(slots_SE.shape[1] / _STEP)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if dropped(middle * _STEP) < _DROPS_ALLOWED else (middle + 1, high)
    return Capacity(
        sequences=sequences,
        factors=list(FACTORS),
        dropped=[dropped(factor) for factor in FACTORS],
        enough=round(low * _STEP, 2),
    )


def _choices(margin: State) -> Choices:
    below = [_share(margin["below"][:, place], margin["tokens"]) for place in range(len(BOUNDS))]
    return Choices(
        below=dict(zip(BOUNDS, below, strict=True)),
        rounding=_share(margin["rounding"], margin["tokens"]),
        negative=_share(margin["negative"], margin["tokens"]),
    )


def _share(part_G: Tensor, whole_G: Tensor) -> float:
    return int(part_G.sum()) / max(1, int(whole_G.sum()))


def serving_table(layers: Mapping[int, Serving]) -> Table:
    """One row per layer, by sequence."""
    rows = [[str(index), *_cells(layer)] for index, layer in layers.items()]
    columns = [f"CF {factor:g}" for factor in _SHOWN]
    note = (
        "CF: % of slots dropped if every expert takes its share of a sequence times that capacity factor, and the "
        "least factor that drops under 1 %; expert choice: % of the slots kept if experts chose their tokens, and % of "
        "tokens without any; close: % of tokens whose choice may turn over when router logits are rounded to bfloat16, "
        "and % with a logit margin below 0.1"
    )
    names = ["layer", *columns, "CF for 1 %", "expert choice keeps", "leaves out", "close: bf16", "below 0.1"]
    return Table(title="other ways to route", columns=names, rows=rows, note=note)


def _cells(layer: Serving) -> Sequence[str]:
    first = layer.capacity[0]
    curve = dict(zip(first.factors, first.dropped, strict=True))
    return [
        *(f"{100 * curve[factor]:.1f}" for factor in _SHOWN),
        f"{first.enough:.2f}",
        f"{100 * layer.kept:.1f}",
        f"{100 * layer.orphans:.1f}",
        f"{100 * layer.choices.rounding:.1f}",
        f"{100 * layer.choices.below[0.1]:.1f}",
    ]
