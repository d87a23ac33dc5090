"""Packed checkpoints made from plain ones, and what is meant by them, for the tests of this folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moetools.checkpoint.reader import open_checkpoint
from moetools.formats.base import Format
from moetools.grids.base import Grid

EXPERTS = (".experts.",)
LINEARS = (".experts.", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def write_packed(
    source: Path, out: Path, layout: Format, choose: Callable[[str], Grid | None], *, turned: bool = False
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of `source` with every tensor for which `choose` has a grid packed, and the intended dense tensors.

    Args:
        turned: 3-D tensors lie on disk as [E, inputs, outputs].
    """
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    packed, intended, grids = {}, {}, {}
    for name, tensor in tensors.items():
        grid = choose(name) if tensor.dim() > 1 else None
        if grid is None:
            packed[name] = intended[name] = tensor
            continue
        turn = turned and tensor.dim() == 3
        stored = tensor.mT.contiguous() if turn else tensor
        quantized = grid.quantize(stored.float().reshape(-1, *stored.shape[-2:]))
        packed |= layout.pack(name, quantized, tensor.dtype, **({"transposed": True} if turn else {}))
        dense = layout.dequantize(quantized, tensor.dtype)
        intended[name] = (dense.mT if turn else dense).reshape(tensor.shape).contiguous()
        grids[name] = grid
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(source)
    config = checkpoint.config | {"quantization_config": layout.config(grids, checkpoint)}
    (out / "config.json").write_text(json.dumps(config))
    return out, intended


def among(parts: tuple[str, ...], grid: Grid) -> Callable[[str], Grid | None]:
    """`grid` for every tensor whose name has one of `parts`."""
    return lambda name: grid if any(part in name for part in parts) and name.endswith("weight") else None
