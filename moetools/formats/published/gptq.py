"""GPTQ as AutoGPTQ and GPTQModel write it.

`x.qweight` int32 [I bits / 32, O], neighbouring inputs from the low bits; `x.qzeros` int32 [G, O bits / 32], the zero
points less one unless `checkpoint_format` is `gptq_v2`; `x.scales` [G, O]; `x.g_idx` int32 [I], the group of every
input (with `desc_act` no run of neighbours). w[o, i] = s[g_idx[i], o] (q[i, o] - z[g_idx[i], o]). Source: AutoGPTQ,
`qlinear_cuda_old.py`, which lets the zero point wrap around: a stored 15 of 4 bits is 0.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.formats.base import Layout, Packed
from moetools.formats.parts import finite_scale
from moetools.formats.published._groups import Grouped, decode_groups, find_groups, numbers

_BITS = (2, 4, 8)


class Gptq(Layout):
    """Integers in the words of their inputs."""

    name: ClassVar[str] = "gptq"
    stock: ClassVar[bool] = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "gptq"

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        exact = checkpoint.config["quantization_config"].get("checkpoint_format") == "gptq_v2"
        return find_groups(checkpoint, _BITS, along_inputs=True, zero_offset=0 if exact else 1)

    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        assert isinstance(packed, Grouped)
        parts = {part: tensors[disk] for part, disk in packed.parts.items()}
        codes_IO = numbers(parts["main"], packed.bits).transpose(1, 2).flatten(0, 1)
        zero_GO = numbers(parts["zeros"], packed.bits).flatten(1)
        group_I = parts["g_idx"].long() if "g_idx" in parts else torch.arange(len(codes_IO)) // packed.group_size
        scale_GO = finite_scale(packed.name, parts["scales"])
        return decode_groups(packed, codes_IO, zero_GO, scale_GO, group_I).to(TORCH_DTYPES[packed.dtype])


LAYOUT = Gptq()
