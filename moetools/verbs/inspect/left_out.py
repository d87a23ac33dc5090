"""What fewer experts would leave out: the share of slots that went to the others, judged on sequences of their own."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.statistics.base import State

DRAWS = 200
"""Bootstrap samples of the judged sequences."""
MIN_SEQUENCES = 10
"""With fewer sequences to judge on, nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share with its 95 % interval over bootstrap samples of whole sequences."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Shares of slots, by the number of experts kept per layer.

    Attributes:
        share_RLE: the value as measured, then `DRAWS` bootstrap samples; [r, l, n - 1] is the share of layer l's slots
            that went to other experts than the n most used ones.
        sequences: judged on.
    """

    share_RLE: Float[Tensor, "R L E"]
    sequences: int

    def of(self, kept: int) -> Estimate:
        """Mean over the layers, for so many experts in each."""
        return _estimate(self.share_RLE[:, :, kept - 1].mean(1))

    def of_layer(self, place: int, kept: int) -> Estimate:
        """Of the layer at `place` among the MoE layers."""
        return _estimate(self.share_RLE[:, place, kept - 1])

    def enough(self, share: float, *, counts: Iterable[int]) -> int | None:
        """The least of `counts` (ascending) that leaves out less than `share` at the upper end of the interval."""
        return next((count for count in counts if self.of(count).high < share), None)


def left_out(layers: Iterable[State], *, seed: int, task: int | None = None) -> LeftOut | None:
    """From the layers' "sequence_load": experts are ordered by one half of the sequences and judged on the other.

    Sequences of every task go to the halves in turn. The judged ones are drawn with replacement, the same in every
    layer, because a sequence goes through all of them.

    Args:
        task: only its sequences; None: all.

    Returns:
        None where there are fewer than 10 sequences to judge on.
    """
    states = list(layers)
    chooses_S, judges_S = _halves(states[0]["task"], task)
    judged = int(judges_S.sum())
    if judged < MIN_SEQUENCES:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn_RS = torch.randint(judged, (DRAWS, judged), generator=generator)
    times_RS = torch.zeros(DRAWS, judged).scatter_add_(1, drawn_RS, torch.ones(drawn_RS.shape))
    weight_RS = torch.cat([torch.ones(1, judged), times_RS]).double()
    shares = []
    for state in states:
        order_E = state["slots"][chooses_S].sum(0).argsort(descending=True, stable=True)
        slots_RE = weight_RS @ state["slots"][judges_S][:, order_E].double()
        total_R1 = slots_RE.sum(1, keepdim=True)
        shares.append((1 - slots_RE.cumsum(1) / total_R1.clamp(min=1)).clamp(min=0))
    return LeftOut(share_RLE=torch.stack(shares, 1), sequences=judged)


def _halves(task_S: Int[Tensor, "S"], task: int | None) -> tuple[Tensor, Tensor]:
    """Masks of the sequences that choose and of those that judge."""
    chooses_S = torch.zeros(len(task_S), dtype=torch.bool)
    judges_S = chooses_S.clone()
    for one in range(int(task_S.max()) + 1) if task is None else (task,):
        mine = (task_S == one).nonzero().squeeze(1)
        chooses_S[mine[::2]] = True
        judges_S[mine[1::2]] = True
    return chooses_S, judges_S


def _estimate(value_R: Tensor) -> Estimate:
    low, high = value_R[1:].quantile(torch.tensor([0.025, 0.975], dtype=value_R.dtype)).tolist()
    return Estimate(value=float(value_R[0]), low=low, high=high)
