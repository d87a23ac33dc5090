"""compressed-tensors' `float-quantized`: FP8 (E4M3) weights with one scale per row, activations to FP8 per token.

`weight` float8_e4m3fn [O, I], `weight_scale` [O, 1]. Loaders multiply in fp32 and round once, to the model's dtype.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.formats.base import Format, Packed, UnknownPackingError, only_matrix
from moetools.formats.parts import FLOATS, finite_scale, matrix, model_dtype, part_names, torch_name
from moetools.formats.schemes import METHOD, find_weights, module_name, write_config
from moetools.grids.base import Grid, Params, Quantized, make_grid

ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}


class FloatQuantized(Format):
    """FP8 per row with dynamic activations."""

    name: ClassVar[str] = "float-quantized"
    working_bytes: ClassVar[int] = 12

    def accepts(self, grid: Grid) -> bool:
        return grid.kind == "float8" and grid.group_size is None

    def pack(self, name: str, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:  # noqa: ARG002
        if not self.accepts(quantized.grid):
            raise ValueError(f"{self.name} cannot store {quantized.grid.describe()}")
        matrix = only_matrix(quantized)
        scale_dtype = getattr(torch, quantized.grid.scale_dtype)  # type: ignore[attr-defined]
        return {
            name: matrix.codes_BOI[0].cpu().contiguous().view(torch.float8_e4m3fn),
            f"{name}_scale": matrix.params.scale_BOG[0].cpu().to(scale_dtype).contiguous(),
        }

    def dequantize(self, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "B O I"]:
        return quantized.dequantize().to(dtype)

    def config(self, grids: Mapping[str, Grid], source: Checkpoint) -> dict[str, Any]:
        scheme = {"input_activations": ACTIVATIONS, "weights": WEIGHTS}
        return write_config(self.name, dict.fromkeys(grids, scheme), source)

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == METHOD and config.get("format") == self.name

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        found, dtype = [], model_dtype(checkpoint)
        for name, parts in part_names(checkpoint, "", ("scale",)).items():
            weights = find_weights(checkpoint.config["quantization_config"], module_name(name))
            info, scale = checkpoint.tensors[name], matrix(checkpoint, parts["scale"], FLOATS)
            if weights.get("strategy") != "channel" or info.dtype != "F8_E4M3" or scale.shape != (*info.shape[:-1], 1):
                message = f"'{name}': {info.dtype} {list(info.shape)} with scale {list(scale.shape)} is not read here"
                raise UnknownPackingError(f"{message}; read is E4M3 with one scale per row")
            grid = make_grid({"kind": "float8", "scale_dtype": torch_name(scale.dtype)})
            found.append(Packed(name=name, shape=info.shape, dtype=dtype, parts=parts, grid=grid))
        return found

    def unpack(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Quantized:
        assert packed.grid is not None
        codes_OI = tensors[packed.parts[""]].view(torch.uint8)
        params = Params(scale_BOG=finite_scale(packed.name, tensors[packed.parts["scale"]])[None])
        return Quantized(grid=packed.grid, codes_BOI=codes_OI[None], params=params)


FORMAT = FloatQuantized()
