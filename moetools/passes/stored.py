"""Layers that an interrupted run had finished: passes run forward through them and never solve them again."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Stored = Mapping[int | None, Mapping[str, Tensor]]
"""Index of a layer in the NEW model -> its fused tensors as `StockModel.read_layer` gives them for the output; None ->
what is outside the layers, by name on disk. What is still to be made is not in it."""

NOTHING_STORED: Stored = {}


@dataclass(frozen=True, kw_only=True)
class ReplayedLayer:
    """A stored layer, behind which every stream now is.

    Attributes:
        index: in the new model.
        tensors: the stored ones.
    """

    index: int
    tensors: Mapping[str, Tensor]


def last_open(stored: Stored, layers: int) -> int:
    """The last of so many layers that is still to be made, -1 if there is none; streams are needed up to there."""
    return next((index for index in reversed(range(layers)) if index not in stored), -1)
