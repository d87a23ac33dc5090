"""Layers that an interrupted run had finished."""

from collections.abc import Callable, Mapping

from torch import Tensor

Stored = Callable[[int], Mapping[str, Tensor] | None]
"""stored(index) -> the fused tensors of a finished layer of the new model as a loader has them, or None."""


def nothing_stored(_index: int) -> None:
    """Of a run that starts afresh."""
    return
