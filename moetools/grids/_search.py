"""Search for the scale (and zero) of each group that lets its weights be rounded with least error."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.grids.base import Params

ScaleZero = tuple[Tensor, Tensor | None]
"""Scales and zeros [B, O, G, 1]; no zeros for symmetric grids."""

_CACHED_ELEMENTS = 2**17


class Search:
    """The best scales (and zeros) offered so far, group by group.

    The error of a group is sum_i importance_i (w_i - rounded_i)^2.
    """

    def __init__(
        self,
        groups_BOGS: Float[Tensor, "B O G S"],
        importance_BOGS: Float[Tensor, "B #O G S"],
        rounded: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> None:
        self.groups, self.importance, self.rounded = groups_BOGS, importance_BOGS, rounded
        self.error: Tensor | None = None
        self.best: ScaleZero

    def offer(self, scale: Tensor, zero: Tensor | None = None) -> None:
        """Keep these where their error is lower than that of all before them; the first are kept anywhere."""
        error = self.rounded(self.groups, scale, zero).sub_(self.groups).square_().mul_(self.importance)
        error = error.sum(-1, keepdim=True)
        if self.error is None:
            self.error, self.best = error, (scale, zero)
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        best_scale, best_zero = self.best
        best_zero = None if zero is None or best_zero is None else torch.where(better, zero, best_zero)
        self.best = torch.where(better, scale, best_scale), best_zero


def in_pieces(
    fit: Callable[[Tensor, Tensor | None], Params], weight_BOI: Tensor, importance_BI: Tensor | None
) -> Params:
    """`fit`, which treats rows alike, on as many rows at a time as stay in a processor's cache (four times faster)."""
    batch, rows, columns = weight_BOI.shape
    fitting = max(1, _CACHED_ELEMENTS // columns)
    if weight_BOI.device.type != "cpu" or batch * rows <= fitting:
        return fit(weight_BOI, importance_BI)
    matrices, rows_each = max(1, fitting // rows), min(rows, fitting)
    done = []
    for first in range(0, batch, matrices):
        some = slice(first, first + matrices)
        importance = None if importance_BI is None else importance_BI[some]
        parts = [fit(weight_BOI[some, row : row + rows_each], importance) for row in range(0, rows, rows_each)]
        done.append(Params.joined(parts, 1))
    return Params.joined(done, 0)


def grouped(tensor_BOI: Float[Tensor, "B O I"], size: int | None) -> Float[Tensor, "B O G S"]:
    """Columns cut into groups of `size`, which must divide them; None is one group."""
    return tensor_BOI.unflatten(2, (-1, size or tensor_BOI.shape[2]))


def grouped_importance(
    importance_BI: Float[Tensor, "B I"] | None, weight_BOI: Float[Tensor, "B O I"], size: int | None
) -> Float[Tensor, "B 1 G S"]:
    """The importance by groups, as one row for all; ones where it is None and in groups where all of it is zero."""
    if importance_BI is None:
        return grouped(torch.ones_like(weight_BOI[:, :1], dtype=torch.float32), size)
    importance = grouped(importance_BI.float()[:, None, :], size)
    return torch.where(importance.sum(-1, keepdim=True) > 0, importance, 1.0)


def positive_storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to `dtype`, as fp32, kept among its positive normal numbers; 1 in place of 0."""
    limits = torch.finfo(dtype)
    return torch.where(scale == 0, 1.0, scale.clamp(limits.tiny, limits.max)).to(dtype).float()
