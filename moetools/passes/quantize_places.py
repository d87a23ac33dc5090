"""Which tensors on disk are quantized, and with how many bits."""

from dataclasses import dataclass, replace

from moetools.architectures.base import Part
from moetools.forward.expert_tensors import ExpertTensor
from moetools.grids.base import Grid
from moetools.grids.integer import Integer
from moetools.grids.kquant import SHAPES, Kquant


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
    """The same integer grid, or K-quant, with another width; beyond the widest K-quant integers in groups of 32."""
    if isinstance(grid, Kquant):
        return Kquant(type=f"Q{bits}_K") if f"Q{bits}_K" in SHAPES else Integer(bits=bits, group_size=32)
    return replace(grid, bits=bits)  # type: ignore[call-arg]
