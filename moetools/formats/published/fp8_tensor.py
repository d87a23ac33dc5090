"""FP8 with one scale for every tensor, as NVIDIA's ModelOpt (`quant_algo: FP8`), AutoFP8 and Mistral write it.

`weight` E4M3 [O, I]; `weight_scale` (Mistral: `weight_scale_inv`) fp32, one number; `input_scale` (`activation_scale`),
`k_scale` and `v_scale`, which only FP8 arithmetic and FP8 caches need. W = weight * weight_scale. Source: vLLM,
`quantization/modelopt.py` and `quantization/fp8.py`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import CheckpointError
from moetools.formats.base import Layout, Packed
from moetools.formats.parts import finite_scale, model_dtype, suffixed_parts

_SCALES = (".weight_scale", ".weight_scale_inv")
_UNUSED = {"input": ".input_scale", "activation": ".activation_scale", "k": ".k_scale", "v": ".v_scale"}


class Fp8Tensor(Layout):
    """Weights in FP8, the others plain."""

    name: ClassVar[str] = "fp8-tensor"
    stock: ClassVar[bool] = False
    working_bytes: ClassVar[int] = 8

    def matches(self, config: Mapping[str, Any]) -> bool:
        if config.get("quant_method") == "modelopt":
            return config.get("quant_algo") == "FP8"
        return config.get("quant_method") == "fp8" and config.get("weight_block_size") is None

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        found, dtype = [], model_dtype(checkpoint)
        for suffix in _SCALES:
            for base, parts in suffixed_parts(checkpoint, suffix, {"codes": ".weight"}, optional=_UNUSED).items():
                codes, scale = (checkpoint.tensors[parts[part]] for part in ("codes", "main"))
                single = scale.nbytes == 4 and scale.dtype == "F32"
                if codes.dtype != "F8_E4M3" or len(codes.shape) != 2 or not single:
                    message = f"'{base}.weight': {codes.dtype} {list(codes.shape)} with {scale.dtype}"
                    raise CheckpointError(f"{message} scale {list(scale.shape)} is no FP8 with one scale per tensor")
                found.append(
                    Packed(
                        name=f"{base}.weight",
                        shape=codes.shape,
                        dtype=dtype,
                        parts=parts,
                        grid=None,
                        words="float8 per tensor",
                    )
                )
        return found

    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        scale = finite_scale(packed.name, tensors[packed.parts["main"]].reshape(()))
        return (tensors[packed.parts["codes"]].float() * scale).to(TORCH_DTYPES[packed.dtype])


LAYOUT = Fp8Tensor()
