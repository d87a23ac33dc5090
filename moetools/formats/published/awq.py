"""AWQ as AutoAWQ writes it (`version: gemm`).

`x.qweight` int32 [I, O / 8] and `x.qzeros` int32 [G, O / 8]: eight outputs in a word, of which output c lies in the
nibble 0, 4, 1, 5, 2, 6, 3, 7 [c]; `x.scales` [G, O]. w[o, i] = s[g, o] (q[i, o] - z[g, o]). Source: AutoAWQ,
`gemm.py` and `packing_utils.py`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.formats.base import Layout, Packed, UnknownPackingError
from moetools.formats.parts import finite_scale
from moetools.formats.published._groups import Grouped, decode_groups, find_groups, numbers

_NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7]


class Awq(Layout):
    """Four-bit integers in the words of their outputs."""

    name: ClassVar[str] = "awq"
    stock: ClassVar[bool] = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "awq"

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        config = checkpoint.config["quantization_config"]
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm" or config.get("zero_point") is False:
            message = f"AWQ of version {version} without zero points" if version == "gemm" else f"AWQ version {version}"
            raise UnknownPackingError(f"{message} is not read here; read is version gemm with zero points")
        return find_groups(checkpoint, (4,), along_inputs=False)

    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        assert isinstance(packed, Grouped)
        codes_IO, zero_GO = (
            numbers(tensors[packed.parts[part]], packed.bits)[..., _NIBBLE].flatten(1) for part in ("main", "zeros")
        )
        scale_GO = finite_scale(packed.name, tensors[packed.parts["scales"]])
        group_I = torch.arange(len(codes_IO)) // packed.group_size
        return decode_groups(packed, codes_IO, zero_GO, scale_GO, group_I).to(TORCH_DTYPES[packed.dtype])


LAYOUT = Awq()
