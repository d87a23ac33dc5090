"""Which tensors on disk are quantized, and with how many bits."""

from dataclasses import dataclass, replace

from moetools.architectures.base import Part
from moetools.forward.expert_tensors import ExpertTensor
from moetools.grids.base import Grid


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor on disk that is quantized.

    Attributes:
        layer: its decoder layer; None for embeddings and head.
        part: part of the model.
        shape: (O, I) of its matrices.
        path: path of the module inside the decoder layer, or in the model; None for routed experts.
        expert: what it holds of the routed experts; None for linear layers.
    """

    name: str
    layer: int | None
    part: Part
    shape: tuple[int, int]
    path: str | None = None
    expert: ExpertTensor | None = None


def with_bits(grid: Grid, bits: int) -> Grid:
    """The same integer grid with another width."""
    return replace(grid, bits=bits)  # type: ignore[call-arg]
