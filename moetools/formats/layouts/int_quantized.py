"""compressed-tensors' `int-quantized`: W8A8, int8 weights with one scale per row, activations to int8 per token.

`weight` int8 [O, I], `weight_scale` [O, 1]. The weights are code * scale in the dtype of the scale; what rounding the
activations costs is not part of them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError
from moetools.formats.base import Format, Packed, UnknownPackingError, only_matrix
from moetools.formats.parts import FLOATS, finite_scale, matrix, part_names, torch_name
from moetools.formats.schemes import METHOD, find_weights, module_name, write_config
from moetools.grids.base import Grid, Params, Quantized
from moetools.grids.integer import Integer

ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


class IntQuantized(Format):
    """W8A8 with dynamic activations."""

    name: ClassVar[str] = "int-quantized"
    preference: ClassVar[int] = 1
    working_bytes: ClassVar[int] = 12

    def accepts(self, grid: Grid) -> bool:
        return isinstance(grid, Integer) and grid.bits == 8 and grid.symmetric and grid.group_size is None

    def pack(self, name: str, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:  # noqa: ARG002
        scale_dtype, matrix = self._scale_dtype(quantized), only_matrix(quantized)
        return {
            name: matrix.codes_BOI[0].cpu().contiguous(),
            f"{name}_scale": matrix.params.scale_BOG[0].cpu().to(scale_dtype).contiguous(),
        }

    def dequantize(self, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "B O I"]:  # noqa: ARG002
        return quantized.dequantize().to(self._scale_dtype(quantized))

    def config(self, grids: Mapping[str, Grid], source: Checkpoint) -> dict[str, Any]:
        scheme = {"input_activations": ACTIVATIONS, "weights": WEIGHTS}
        return write_config(self.name, dict.fromkeys(grids, scheme), source)

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == METHOD and config.get("format") == self.name

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        found = []
        for name, parts in part_names(checkpoint, "", ("scale",)).items():
            weights = find_weights(checkpoint.config["quantization_config"], module_name(name))
            if weights.get("strategy") != "channel" or not weights.get("symmetric"):
                raise UnknownPackingError(
                    f"'{name}': scheme {weights} is not read here; read are symmetric integers with one scale per row"
                )
            info, scale = matrix(checkpoint, name, ("I8",)), matrix(checkpoint, parts["scale"], FLOATS)
            if scale.shape != (info.shape[0], 1):
                raise CheckpointError(
                    f"'{name}': {info.dtype} {info.shape} with scale {scale.shape} is not int8 per row"
                )
            grid = Integer(bits=8, scale_dtype=torch_name(scale.dtype))  # type: ignore[arg-type]
            found.append(Packed(name=name, shape=info.shape, dtype=scale.dtype, parts=parts, grid=grid))
        return found

    def unpack(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Quantized:
        assert packed.grid is not None
        params = Params(scale_BOG=finite_scale(packed.name, tensors[packed.parts["scale"]])[None])
        return Quantized(grid=packed.grid, codes_BOI=tensors[packed.parts[""]][None], params=params)

    def _scale_dtype(self, quantized: Quantized) -> torch.dtype:
        if not self.accepts(quantized.grid):
            raise ValueError(f"{self.name} cannot store {quantized.grid.describe()}")
        return getattr(torch, quantized.grid.scale_dtype)  # type: ignore[attr-defined]


FORMAT = IntQuantized()
