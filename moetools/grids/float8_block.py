"""Eight-bit floats E4M3 with one scale per block of rows and columns (DeepSeek-V3's layout)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from moetools.grids._e4m3 import LARGEST, OCTAVE_STEPS, round_e4m3
from moetools.grids._search import Search, positive_storable
from moetools.grids.base import Grid, Params


@dataclass(frozen=True, kw_only=True)
class Float8Block(Grid):
    """value = e4m3 * scale; one fp32 scale per `block_rows` x `group_size` block, the last ones smaller.

    Codes are the bits of `torch.float8_e4m3fn` as uint8. `scale_BOG` repeats a block's scale over its rows.
    """

    kind: ClassVar[str] = "float8_block"
    fixed_blocks: ClassVar[bool] = True

    group_size: int | None = 128
    block_rows: int = 128

    def fit(self, weight_BOI: Float[Tensor, "B O I"], importance_BI: Float[Tensor, "B I"] | None = None) -> Params:
        """The best of 8 scales per block, from the one that takes its largest weight to 448 up to twice that."""
        rows, columns = weight_BOI.shape[1:]
        blocks = self._blocks(weight_BOI.float(), columns)
        importance = torch.ones_like(weight_BOI[:, :1], dtype=torch.float32)
        if importance_BI is not None:
            importance = importance_BI.float()[:, None, :]
        importance = self._blocks(importance.expand(-1, min(rows, self.block_rows), -1), columns)
        importance = torch.where(importance.sum(-1, keepdim=True) > 0, importance, 1.0)
        search = Search(blocks, importance, lambda block, scale, _: round_e4m3(block / scale).float() * scale)
        largest = blocks.abs().amax(-1, keepdim=True)
        for octave in range(OCTAVE_STEPS):
            search.offer(positive_storable(largest / LARGEST * 2 ** (octave / OCTAVE_STEPS), torch.float32))
        return Params(scale_BOG=search.best[0][..., 0].repeat_interleave(self.block_rows, 1)[:, :rows])

    def encode(self, weight_BOC: Float[Tensor, "B O C"], params_BOC: Params) -> Tensor:
        return round_e4m3(weight_BOC.float() / params_BOC.scale_BOG).view(torch.uint8)

    def decode(self, codes_BOC: Tensor, params_BOC: Params) -> Float[Tensor, "B O C"]:
        return codes_BOC.view(torch.float8_e4m3fn).float() * params_BOC.scale_BOG

    def storage_bits(self, rows: int, columns: int) -> float | int:
        blocks = math.ceil(rows / self.block_rows) * math.ceil(columns / (self.group_size or columns))
        return 8 * rows * columns + 32 * blocks

    def _blocks(self, tensor_BOI: Tensor, columns: int) -> Float[Tensor, "B R G S"]:
        """Elements by block of rows R and of columns G, padded with zeros."""
        size = self.group_size or columns
        padded = pad(tensor_BOI, (0, -columns % size, 0, -tensor_BOI.shape[1] % self.block_rows))
        return padded.unflatten(2, (-1, size)).unflatten(1, (-1, self.block_rows)).transpose(2, 3).flatten(3)


GRID = Float8Block
