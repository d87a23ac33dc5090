"""DeepSeek-V4: experts in FP4 with a power of two per 32 columns, everything else in FP8 in blocks of 128 x 128.

`weight` int8 [O, I / 2], two E2M1 codes a byte, the even column in the low half, with `scale` E8M0 [O, I / 32]; or
`weight` E4M3 [O, I] with `scale` E8M0 [ceil(O / 128), ceil(I / 128)]. W = weight * scale, in fp32, rounded once.
Source: transformers, `integrations/finegrained_fp8.py`, `Fp8Dequantize`.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import CheckpointError
from moetools.formats.base import Layout, Packed
from moetools.formats.nibbles import unpack_nibbles
from moetools.formats.parts import finite_scale, matrix, model_dtype, suffixed_parts
from moetools.grids._e2m1 import decode_e2m1

_BLOCK, _GROUP = 128, 32
_SCALE = ".scale"


class DeepseekV4(Layout):
    """FP4 and FP8 beside each other, told apart by dtype."""

    name: ClassVar[str] = "deepseek-v4"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "fp8" and config.get("weight_block_size") == [_BLOCK, _BLOCK]

    def fits(self, names: Collection[str]) -> bool:
        return any(name.endswith(_SCALE) and f"{name.removesuffix(_SCALE)}.weight" in names for name in names)

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        dtype = model_dtype(checkpoint)
        found = suffixed_parts(checkpoint, _SCALE, {"codes": ".weight"})
        return [_packed(checkpoint, f"{base}.weight", parts, dtype) for base, parts in found.items()]

    def stock_problem(self, packed: Packed) -> str:
        if packed.words.startswith("float8") and any(size > _BLOCK and size % _BLOCK for size in packed.shape):
            return f"blocks of {_BLOCK} do not tile '{packed.name}', and transformers takes others"
        return ""

    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scale_OG = tensors[packed.parts["codes"]], tensors[packed.parts["main"]]
        scale_OG = finite_scale(packed.name, scale_OG)
        if codes.dtype == torch.int8:
            value_OI = decode_e2m1(unpack_nibbles(codes.view(torch.uint8)))
            dense = value_OI * scale_OG.repeat_interleave(_GROUP, dim=1)
        else:
            scale_OI = scale_OG.repeat_interleave(_BLOCK, 0)[: len(codes)].repeat_interleave(_BLOCK, 1)
            dense = codes.float() * scale_OI[:, : codes.shape[1]]
        return dense.to(TORCH_DTYPES[packed.dtype])


def _packed(checkpoint: Checkpoint, name: str, parts: Mapping[str, str], dtype: str) -> Packed:
    codes = matrix(checkpoint, parts["codes"], ("I8", "F8_E4M3"))
    scale = matrix(checkpoint, parts["main"], ("F8_E8M0",))
    rows, columns = codes.shape
    if codes.dtype == "I8":
        columns *= 2
        blocks, words = (rows, columns // _GROUP), f"mxfp4 per {_GROUP} columns"
        whole = columns % _GROUP == 0
    else:
        blocks, words = (-(-rows // _BLOCK), -(-columns // _BLOCK)), f"float8_block per {_BLOCK} columns"
        whole = True
    if not whole or scale.shape != blocks:
        message = f"'{name}': {codes.dtype} {list(codes.shape)} with scale {list(scale.shape)}"
        raise CheckpointError(f"{message} is no {words}")
    return Packed(name=name, shape=(rows, columns), dtype=dtype, parts=parts, grid=None, words=words)


LAYOUT = DeepseekV4()
