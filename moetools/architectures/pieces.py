"""Tensors of an engine's file that are parts of tensors on disk; no torch, as `inspect` reads families without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[Any], Any]
"""A tensor -> the tensor in its place."""
Rows = Literal["all", "first half", "second half", "even", "odd", "keys", "values"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of the file that is a part of one on disk.

    Attributes:
        tensor: pattern of the whole name on disk; its group is the layer.
        name: name in the file, with `{layer}`.
        rows: the output rows it holds. `keys` and `values`: of latent attention's `kv_b_proj`, one matrix per head,
            that of the keys transposed.
        transposed: whether the matrices lie on disk as [inputs, outputs].
        order: config.json -> the output rows it holds, where `rows` does not tell.
        value: what a vector or filter becomes; a GGUF file has it in fp32.
    """

    tensor: str
    name: str
    rows: Rows = "all"
    transposed: bool = False
    order: Callable[[Mapping[str, Any]], Tensor] | None = None
    value: Change | None = None


def part_of_rows(rows: Rows, count: int) -> Tensor:
    """Indices [R] of halves, or of every other one, of `count` rows; all rows under any other name."""
    import torch

    every, half = torch.arange(count), count // 2
    parts = {"first half": every[:half], "second half": every[half:], "even": every[::2], "odd": every[1::2]}
    return parts.get(rows, every)
