"""Where the experts of a layer lie on disk, found with numbered elements instead of a table of every family's names."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moetools.architectures.weights import LayerWeights

_WIDTH, _HIDDEN = 2, 3

Projection = Literal["gate", "up", "gate_up", "interleaved", "down"]


@dataclass(frozen=True, kw_only=True)
class ExpertTensor:
    """What a tensor on disk holds of a layer's experts.

    Attributes:
        name: the tensor on disk, [O, I] for one expert or [E, O, I] for all of them.
        expert: its expert; None where the tensor holds all experts.
        projection: "gate_up" is gate's rows, then up's; "interleaved" is the two alternating, row by row.
        transposed: stored as [I, O].
    """

    name: str
    expert: int | None
    projection: Projection
    transposed: bool


class NumberedExperts:
    """Experts of 2 neurons and 3 inputs whose elements are numbered, so that they are known under any name and layout.

    Gate's and up's numbers grow from 0, down's fall from -1.
    """

    def __init__(self, count: int, *, gated: bool) -> None:
        self._gated = gated
        inputs = 2 * _WIDTH if gated else _WIDTH
        wide = torch.arange(count * inputs * _HIDDEN, dtype=torch.float64)
        down = torch.arange(count * _HIDDEN * _WIDTH, dtype=torch.float64)
        self._wide_EWD = wide.reshape(count, inputs, _HIDDEN)
        self._down_EDW = -1 - down.reshape(count, _HIDDEN, _WIDTH)

    def weights(self) -> LayerWeights:
        """As a layer's canonical weights, with a router of zeros."""
        wide = self._wide_EWD
        gate, up = (wide[:, :_WIDTH], wide[:, _WIDTH:]) if self._gated else (None, wide)
        router = torch.zeros(len(wide), _HIDDEN)
        return LayerWeights(up_EFD=up, down_EDF=self._down_EDW, gate_EFD=gate, router_ED=router)

    def identify(self, name: str, tensor: Tensor) -> ExpertTensor:
        """Which of the elements a tensor holds that was made of `weights`."""
        first = tensor if tensor.dim() == 2 else tensor[0]
        is_down = bool((tensor < 0).all())
        source = self._down_EDW if is_down else self._wide_EWD
        expert = int((source - first.reshape(-1)[0]).abs().flatten(1).amin(1).argmin())
        # Numbers grow by one along a matrix' columns.
        transposed = abs(float(first[0, 1] - first[0, 0])) != 1
        column = first[0] if transposed else first[:, 0]
        rows = tuple(int((source[expert, :, 0] - value).abs().argmin()) for value in column)
        named: dict[tuple[int, ...], Projection] = {
            (0, 1): "gate" if self._gated else "up",
            (2, 3): "up",
            (0, 1, 2, 3): "gate_up",
            (0, 2, 1, 3): "interleaved",
        }
        return ExpertTensor(
            name=name,
            expert=None if tensor.dim() == 3 else expert,
            projection="down" if is_down else named[rows],
            transposed=transposed,
        )
