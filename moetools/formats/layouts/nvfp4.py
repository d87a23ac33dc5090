"""compressed-tensors' `nvfp4-pack-quantized` (NVFP4A16): E2M1 codes in groups of 16 with E4M3 scales.

`weight_packed` uint8 [O, I / 2], the even column in the low four bits; `weight_scale` float8_e4m3fn [O, I / 16];
`weight_global_scale` fp32 [1]. Value = code * (scale / global scale), in fp32, rounded once to bfloat16.
Stock transformers (5.17 and 5.23) forgets the global scale of experts, so the preflight allows vLLM only.
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

GROUP = 16
LAYOUT = "nvfp4-pack-quantized"
WEIGHTS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": GROUP,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}


class NvFp4(Format):
    """NVFP4 weights, activations untouched."""

    name: ClassVar[str] = "nvfp4"

    def accepts(self, grid: Grid) -> bool:
        return grid.kind == "nvfp4"

    def pack(self, name: str, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:  # noqa: ARG002
        if not self.accepts(quantized.grid):
            raise ValueError(f"{self.name} cannot store {quantized.grid.describe()}")
        matrix = only_matrix(quantized)
        scale_OG, exponent = _split(matrix.params.scale_BOG[0].cpu())
        return {
            f"{name}_packed": pack_nibbles(matrix.codes_BOI[0].cpu()),
            f"{name}_scale": scale_OG.contiguous(),
            # compressed-tensors stores the reciprocal; both are powers of two.
            f"{name}_global_scale": torch.tensor([2.0**-exponent], dtype=torch.float32),
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
        grid = make_grid({"kind": "nvfp4", "group_size": GROUP})
        for name, parts in part_names(checkpoint, "packed", ("scale", "global_scale")).items():
            info, scale = matrix(checkpoint, parts["packed"], ("U8",)), matrix(checkpoint, parts["scale"], ("F8_E4M3",))
            shape = (info.shape[0], 2 * info.shape[1])
            whole = checkpoint.tensors[parts["global_scale"]]
            single = whole.dtype == "F32" and whole.nbytes == 4
            if not single or shape[1] % GROUP or scale.shape != (shape[0], shape[1] // GROUP):
                message = f"'{name}': {info.dtype} {list(info.shape)} with {scale.dtype} scale {list(scale.shape)}"
                raise CheckpointError(f"{message} is no NVFP4")
            found.append(Packed(name=name, shape=shape, dtype=dtype, parts=parts, grid=grid))
        return found

    def unpack(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Quantized:
        assert packed.grid is not None
        whole = tensors[packed.parts["global_scale"]].float().reshape(-1)[0]
        if not bool(torch.isfinite(whole)) or float(whole) == 0:
            raise CheckpointError(f"'{packed.name}': global scale {float(whole)}")
        params = Params(scale_BOG=finite_scale(packed.name, tensors[packed.parts["scale"]].float() / whole)[None])
        codes_OI = unpack_nibbles(tensors[packed.parts["packed"]])
        return Quantized(grid=packed.grid, codes_BOI=codes_OI[None], params=params)


def _split(scale_OG: Tensor) -> tuple[Tensor, int]:
    """E4M3 scales and the exponent of the global one, a multiple of 4 where that loses nothing.

    vLLM wants gate and up of an expert to share the global scale; so coarse an exponent is mostly the same for both.
    """
    from moetools.grids.nvfp4 import split_scale

    least, exponent = split_scale(scale_OG)
    coarse = -(-exponent // 4) * 4
    rounded, _ = split_scale(scale_OG, coarse)
    if torch.equal(rounded.float() * 2.0**coarse, scale_OG):
        return rounded, coarse
    return least, exponent


FORMAT = NvFp4()
