"""NVFP4 as NVIDIA's ModelOpt writes it.

`weight` uint8 [O, I / 2], two E2M1 codes a byte, the even column in the low half; `weight_scale` E4M3 [O, I / 16];
`weight_scale_2` fp32, one number; `input_scale`, which only FP4 arithmetic needs. W = E2M1 * weight_scale *
weight_scale_2. Source: ModelOpt, `nvfp4_tensor.py`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import CheckpointError
from moetools.formats.base import Layout, Packed
from moetools.formats.nibbles import unpack_nibbles
from moetools.formats.parts import finite_scale, matrix, model_dtype, suffixed_parts
from moetools.grids._e2m1 import decode_e2m1

_GROUP = 16


class ModeloptNvfp4(Layout):
    """Weights in NVFP4, the others plain."""

    name: ClassVar[str] = "modelopt-nvfp4"
    stock: ClassVar[bool] = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "modelopt" and config.get("quant_algo") in ("NVFP4", "W4A16_NVFP4")

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        found, dtype = [], model_dtype(checkpoint)
        needed = {"codes": ".weight", "scale": ".weight_scale"}
        for base, parts in suffixed_parts(
            checkpoint, ".weight_scale_2", needed, optional={"input": ".input_scale"}
        ).items():
            codes = matrix(checkpoint, parts["codes"], ("U8",))
            scale = matrix(checkpoint, parts["scale"], ("F8_E4M3",))
            whole = checkpoint.tensors[parts["main"]]
            shape = (codes.shape[0], 2 * codes.shape[1])
            single = whole.dtype == "F32" and whole.nbytes == 4
            if not single or shape[1] % _GROUP or scale.shape != (shape[0], shape[1] // _GROUP):
                message = f"'{base}.weight': {codes.dtype} {list(codes.shape)} with scale {list(scale.shape)}"
                raise CheckpointError(f"{message} is no NVFP4")
            words = f"nvfp4 per {_GROUP} columns"
            found.append(Packed(name=f"{base}.weight", shape=shape, dtype=dtype, parts=parts, grid=None, words=words))
        return found

    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        whole = tensors[packed.parts["main"]].reshape(())
        scale_OG = finite_scale(packed.name, tensors[packed.parts["scale"]].float() * whole)
        value_OI = decode_e2m1(unpack_nibbles(tensors[packed.parts["codes"]]))
        return (value_OI * scale_OG.repeat_interleave(_GROUP, dim=1)).to(TORCH_DTYPES[packed.dtype])


LAYOUT = ModeloptNvfp4()
