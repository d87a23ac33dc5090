"""Blocks of bytes of GGUF's quantized types, made of codes and scales as they are.

Source: ggml's `ggml-common.h` (`block_q4_0` and so on) and `dequantize_row_*` in `ggml-quants.c`; element j of a
block of four-bit codes lies in the low half of byte j, element j + 16 in its high half.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moetools.errors import UserError
from moetools.formats.gguf_super import blocks_of, decoded_super, encode_super, own_type
from moetools.grids.base import Grid, Quantized
from moetools.grids.integer import Integer
from moetools.grids.kquant import COLUMNS, SHAPES, Kquant

Ternary = Literal["TQ1_0", "TQ2_0"]
BLOCKS = {"TQ1_0": 256, "TQ2_0": 256, "Q4_0": 32, "Q5_0": 32, "Q8_0": 32, "Q4_1": 32, "Q5_1": 32, "MXFP4": 32}
BLOCKS |= dict.fromkeys(SHAPES, COLUMNS)
"""Columns of a block, by type."""
GROUPS = BLOCKS | {name: shape.group for name, shape in SHAPES.items()}
"""Columns that have a scale, by type."""
WIDENING = (["Q4_0", "Q5_0", "Q8_0"], ["Q4_1", "Q5_1"], ["Q3_K", "Q6_K"], ["Q4_K", "Q5_K"])
"""Each holds the codes of those before it; of K-quants the scales, too."""
_HALF_LIMIT = 65504.0
_E8M0_BIAS = 127


def package() -> Any:
    """The package gguf.

    Raises:
        UserError: it is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF needs the package gguf", hint="pip install 'moetools[gguf]'") from error
    return gguf


def kind_of(grid: Grid | None, columns: int, ternary: Ternary) -> str | None:
    """The type that holds a grid's codes and scales for rows of some columns; None if there is none."""
    if grid is not None and grid.kind == "mxfp4":
        return "MXFP4"
    if isinstance(grid, Kquant):
        return grid.type
    if not isinstance(grid, Integer):
        return None
    if grid.ternary:
        return ternary
    found = own_type(grid, columns)
    if found is not None:
        return found
    if not grid.symmetric:
        return "Q4_1" if grid.bits <= 4 else "Q5_1" if grid.bits == 5 else None
    return "Q4_0" if grid.bits <= 4 else "Q5_0" if grid.bits == 5 else "Q8_0"


def encode_blocks(quantized: Quantized, kind: str, name: str) -> np.ndarray:
    """The blocks of all rows, flat bytes.

    Raises:
        UserError: a scale of `name` that fp16 cannot hold.
    """
    scale_BOG = quantized.params.scale_BOG
    if kind == "MXFP4":
        exponent = torch.frexp(scale_BOG).exponent - 1 + _E8M0_BIAS
        return _nibbles(exponent.to(torch.uint8).numpy().reshape(-1, 1), _codes(quantized))
    if bool((scale_BOG.abs() > _HALF_LIMIT).any()):
        raise UserError(f"GGUF: a scale of '{name}' is too large for fp16")
    if kind.endswith("_K"):
        return encode_super(blocks_of(quantized, kind), kind).reshape(-1)
    if kind.startswith("TQ"):
        gguf = package()
        values = quantized.dequantize().flatten(0, 1).numpy()
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).reshape(-1)
    head = _per_block(quantized, scale_BOG)
    if quantized.params.zero_BOG is not None:
        offset_BOG = _offset(quantized)
        if bool((offset_BOG.abs() > _HALF_LIMIT).any()):
            raise UserError(f"GGUF: a zero of '{name}' is too large for fp16")
        head = np.concatenate([head, _per_block(quantized, offset_BOG)], axis=1)
    return _PACKERS[kind](head, _codes(quantized)).reshape(-1)


def decoded_blocks(quantized: Quantized, kind: str) -> Tensor:
    """The values [rows, I] that the blocks stand for, fp32.

    Scales are rounded to fp16, or fitted (`gguf_super`), but for MXFP4's powers of two. With zeros a value is
    scale * code + offset, and the offset, -scale * zero, is rounded to fp16 as well: by at most 2^-11 of itself,
    1 / 136 of a step for 4 bits.
    """
    scale_BOG = quantized.params.scale_BOG
    if kind == "MXFP4":
        return quantized.dequantize().flatten(0, 1)
    if kind.endswith("_K"):
        return decoded_super(blocks_of(quantized, kind), kind).view(-1, quantized.codes_BOI.shape[2])
    size = quantized.grid.group_size or quantized.codes_BOI.shape[2]
    value_BOI = quantized.codes_BOI.float() * scale_BOG.half().float().repeat_interleave(size, dim=2)
    if quantized.params.zero_BOG is not None:
        value_BOI += _offset(quantized).half().float().repeat_interleave(size, dim=2)
    return value_BOI.flatten(0, 1)


def _offset(quantized: Quantized) -> Tensor:
    assert quantized.params.zero_BOG is not None
    # + 0.0: no negative zeros, which compare equal but are other bytes.
    return -quantized.params.scale_BOG * quantized.params.zero_BOG + 0.0


def _codes(quantized: Quantized) -> np.ndarray:
    """Codes [N, 32]."""
    return quantized.codes_BOI.numpy().reshape(-1, 32)


def _per_block(quantized: Quantized, value_BOG: Tensor) -> np.ndarray:
    """One fp16 number for each block of 32 columns, as bytes [N, 2]."""
    repeats = (quantized.grid.group_size or quantized.codes_BOI.shape[2]) // 32
    return value_BOG.half().repeat_interleave(repeats, dim=2).numpy().reshape(-1, 1).view(np.uint8)


def _nibbles(head: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([head, codes[:, :16] | (codes[:, 16:] << 4)], axis=1)


def _q8_0(head: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([head, codes.view(np.uint8)], axis=1)


def _q4_0(head: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return _nibbles(head, (codes + 8).astype(np.uint8))


def _q5_0(head: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return _five(head, (codes + 16).astype(np.uint8))


def _five(head: np.ndarray, codes: np.ndarray) -> np.ndarray:
    high = np.packbits(codes >> 4, axis=1, bitorder="little")
    return _nibbles(np.concatenate([head, high], axis=1), codes & 15)


_PACKERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q4_1": _nibbles,
    "Q5_1": _five,
}
"""Bytes [N, size] of blocks, from fp16 numbers as bytes (scale, offset) and codes [N, 32]."""
