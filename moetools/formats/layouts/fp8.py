"""`quant_method: fp8` as DeepSeek-V3 has it: E4M3 weights, one scale for each block of 128 x 128.

`weight` float8_e4m3fn [O, I], `weight_scale_inv` fp32 [ceil(O / 128), ceil(I / 128)]. Loaders multiply in fp32 and
round once, to the model's dtype. transformers reads block sizes off the shapes, so both dimensions must be multiples
of 128.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UserError
from moetools.formats.base import Format, Packed, UnknownPackingError, only_matrix
from moetools.formats.parts import FLOATS, finite_scale, matrix, model_dtype, part_names
from moetools.formats.schemes import module_name, plain_modules
from moetools.grids.base import Grid, Params, Quantized, make_grid

METHOD = "fp8"
BLOCK = 128


class Fp8(Format):
    """FP8 in blocks, activations to FP8 in groups of 128."""

    name: ClassVar[str] = "fp8"
    working_bytes: ClassVar[int] = 12

    def accepts(self, grid: Grid) -> bool:
        return grid.kind == "float8_block" and grid.group_size == BLOCK

    def pack(self, name: str, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:  # noqa: ARG002
        if not self.accepts(quantized.grid):
            raise ValueError(f"{self.name} cannot store {quantized.grid.describe()}")
        matrix = only_matrix(quantized)
        codes_OI = matrix.codes_BOI[0].cpu().contiguous()
        check_blocks(name, tuple(codes_OI.shape))
        return {
            name: codes_OI.view(torch.float8_e4m3fn),
            f"{name}_scale_inv": matrix.params.scale_BOG[0, ::BLOCK].float().cpu().contiguous(),
        }

    def dequantize(self, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "B O I"]:
        return quantized.dequantize().to(dtype)

    def config(self, grids: Mapping[str, Grid], source: Checkpoint) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(dict.fromkeys(["lm_head", *plain_modules(map(module_name, grids), source)])),
        }

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == METHOD and config.get("weight_block_size") == [BLOCK, BLOCK]

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        found, dtype = [], model_dtype(checkpoint)
        grid = make_grid({"kind": "float8_block", "group_size": BLOCK})
        for name, parts in part_names(checkpoint, "", ("scale_inv",)).items():
            info, scale = checkpoint.tensors[name], matrix(checkpoint, parts["scale_inv"], FLOATS)
            blocks = tuple(-(-size // BLOCK) for size in info.shape)
            if info.dtype != "F8_E4M3" or scale.shape != blocks:
                message = f"'{name}': {info.dtype} {list(info.shape)} with scale {list(scale.shape)} is not read here"
                raise UnknownPackingError(f"{message}; read is E4M3 with one scale per {BLOCK} x {BLOCK} block")
            found.append(Packed(name=name, shape=info.shape, dtype=dtype, parts=parts, grid=grid))
        return found

    def unpack(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Quantized:
        assert packed.grid is not None
        scale = finite_scale(packed.name, tensors[packed.parts["scale_inv"]])
        scale_OG = scale.repeat_interleave(BLOCK, dim=0)[: packed.shape[0]]
        codes_OI = tensors[packed.parts[""]].view(torch.uint8)
        return Quantized(grid=packed.grid, codes_BOI=codes_OI[None], params=Params(scale_BOG=scale_OG[None]))


def check_blocks(name: str, shape: tuple[int, ...]) -> None:
    """Refuse a matrix that blocks do not tile.

    Raises:
        UserError: naming the matrix.
    """
    if any(size % BLOCK for size in shape):
        raise UserError(
            f"'{name}' is {list(shape)}; blocks of {BLOCK} do not tile it, and transformers would load it 7-10 % wrong",
            hint="`scheme=fp8` has one scale per row and takes any shape",
        )


FORMAT = Fp8()
