"""compressed-tensors' `mxfp4-pack-quantized` (MXFP4A16): E2M1 codes in groups of 32 with power-of-two scales.

`weight_packed` uint8 [O, I / 2], the even column in the low four bits; `weight_scale` uint8 [O, I / 32], E8M0: the
exponent plus 127. E2M1 times a power of two is exact in bfloat16.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError
from moetools.formats.base import Format, Packed, only_matrix
from moetools.formats.nibbles import pack_nibbles, unpack_nibbles
from moetools.formats.parts import finite_scale, matrix, model_dtype, part_names
from moetools.formats.schemes import METHOD, write_config
from moetools.grids.base import Grid, Params, Quantized, make_grid

GROUP = 32
BIAS = 127
LAYOUT = "mxfp4-pack-quantized"
WEIGHTS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP,
    "dynamic": False,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}


class MxFp4(Format):
    """MXFP4 weights, activations untouched."""

    name: ClassVar[str] = "mxfp4"

    def accepts(self, grid: Grid) -> bool:
        return grid.kind == "mxfp4"

    def pack(self, name: str, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:  # noqa: ARG002
        if not self.accepts(quantized.grid):
            raise ValueError(f"{self.name} cannot store {quantized.grid.describe()}")
        matrix = only_matrix(quantized)
        exponent_OG = torch.frexp(matrix.params.scale_BOG[0].cpu()).exponent - 1
        return {
            f"{name}_packed": pack_nibbles(matrix.codes_BOI[0].cpu()),
            f"{name}_scale": (exponent_OG + BIAS).clamp(0, 254).to(torch.uint8),
        }

    def dequantize(self, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "B O I"]:
        return quantized.dequantize().to(dtype)

    def config(self, grids: Mapping[str, Grid], source: Checkpoint) -> dict[str, Any]:
        scheme = {"input_activations": None, "weights": WEIGHTS}
        return write_config(LAYOUT, dict.fromkeys(grids, scheme), source)

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == METHOD and config.get("format") == LAYOUT

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        found, dtype = [], model_dtype(checkpoint)
        grid = make_grid({"kind": "mxfp4", "group_size": GROUP})
        for name, parts in part_names(checkpoint, "packed", ("scale",)).items():
            info, scale = matrix(checkpoint, parts["packed"], ("U8",)), matrix(checkpoint, parts["scale"], ("U8",))
            shape = (info.shape[0], 2 * info.shape[1])
            if shape[1] % GROUP or scale.shape != (shape[0], shape[1] // GROUP):
                message = f"'{name}': {info.dtype} {list(info.shape)} with {scale.dtype} scale {list(scale.shape)}"
                raise CheckpointError(f"{message} is no MXFP4")
            found.append(Packed(name=name, shape=shape, dtype=dtype, parts=parts, grid=grid))
        return found

    def unpack(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Quantized:
        assert packed.grid is not None
        exponent_OG = tensors[packed.parts["scale"]].float() - BIAS
        params = Params(scale_BOG=finite_scale(packed.name, torch.exp2(exponent_OG))[None])
        codes_OI = unpack_nibbles(tensors[packed.parts["packed"]])
        return Quantized(grid=packed.grid, codes_BOI=codes_OI[None], params=params)


FORMAT = MxFp4()
