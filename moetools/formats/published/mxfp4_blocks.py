"""gpt-oss' own MXFP4: all experts of a layer in one tensor of E2M1 blocks of 32 with a power of two each.

`gate_up_proj_blocks` uint8 [E, O, I / 32, 16], the even element in the low four bits; `gate_up_proj_scales` uint8
[E, O, I / 32], E8M0: the exponent plus 127. The dense tensor is `gate_up_proj` [E, I, O]. Source: transformers,
`integrations/mxfp4.py`, `convert_moe_packed_tensors`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import CheckpointError
from moetools.formats.base import Layout, Packed
from moetools.formats.nibbles import unpack_nibbles
from moetools.formats.parts import finite_scale, model_dtype, suffixed_parts
from moetools.grids._e2m1 import decode_e2m1

_BIAS = 127
_BYTES = 16
"""Of a block of 32."""


class Mxfp4Blocks(Layout):
    """Experts in MXFP4, everything else plain."""

    name: ClassVar[str] = "mxfp4-blocks"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "mxfp4"

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        found, dtype = [], model_dtype(checkpoint)
        for name, parts in suffixed_parts(checkpoint, "_blocks", {"scales": "_scales"}).items():
            blocks, scales = (checkpoint.tensors[parts[part]] for part in ("main", "scales"))
            if (
                (blocks.dtype, scales.dtype) != ("U8", "U8")
                or len(blocks.shape) != 4
                or blocks.shape[-1] != _BYTES
                or scales.shape != blocks.shape[:-1]
                or 0 in blocks.shape
            ):
                message = f"'{name}': {blocks.dtype} blocks {list(blocks.shape)} with {scales.dtype} scales"
                raise CheckpointError(f"{message} {list(scales.shape)} are no MXFP4")
            experts, rows, groups, _ = blocks.shape
            shape = (experts, 2 * _BYTES * groups, rows)
            found.append(
                Packed(name=name, shape=shape, dtype=dtype, parts=parts, grid=None, words="mxfp4 per 32 columns")
            )
        return found

    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        dtype = TORCH_DTYPES[packed.dtype]
        dense = torch.empty(packed.shape, dtype=dtype)
        # One expert at a time: fp32 values of all of them would take eight times what is read.
        for expert, (blocks_OGB, scale_OG) in enumerate(
            zip(tensors[packed.parts["main"]], tensors[packed.parts["scales"]], strict=True)
        ):
            scale_OG = finite_scale(packed.name, torch.exp2(scale_OG.float() - _BIAS))
            value_OGI = decode_e2m1(unpack_nibbles(blocks_OGB)) * scale_OG[..., None]
            dense[expert] = value_OGI.flatten(1).T.to(dtype)
        return dense


LAYOUT = Mxfp4Blocks()
