"""GGUF's super-blocks of 256 columns, Q2_K to Q6_K: our codes, and scales as integers times one fp16 number.

Codes on the K-quants' own grids keep everything. Of integers with scales of their own the codes stay, and units are
fitted to the scales (`moetools.grids._units`).

Source: `block_q2_K` to `block_q6_K` in ggml's `ggml-common.h`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moetools.grids._units import fitted_offsets, fitted_units
from moetools.grids.base import Quantized
from moetools.grids.integer import Integer
from moetools.grids.kquant import COLUMNS, SHAPES, Kquant


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """N super-blocks of G groups: value = d k code, less c m where there are offsets.

    Attributes:
        codes_N: [N, 256], signed or from 0 as the type has them.
        unit_N1, scale_NG: d and k, fp32.
        zero_unit_N1, zero_NG: c and m.
    """

    codes_N: Tensor
    unit_N1: Float[Tensor, "N 1"]
    scale_NG: Float[Tensor, "N G"]
    zero_unit_N1: Float[Tensor, "N 1"] | None = None
    zero_NG: Float[Tensor, "N G"] | None = None


def own_type(grid: Integer, columns: int) -> str | None:
    """The type for integers with a scale per 16 or 32 columns; None if there is none.

    Symmetric codes in groups of 16 have no other type; asymmetric ones in groups of 32 one of single blocks, larger by
    half a bit per weight, which rows of other lengths get.
    """
    if grid.ternary or grid.float_zero:
        return None
    if grid.symmetric:
        kind = "Q3_K" if grid.bits <= 3 else "Q6_K" if grid.bits <= 6 else None
        return kind if grid.group_size == 16 else None
    if grid.group_size == 16:
        return "Q2_K" if grid.bits <= 2 else None
    if grid.group_size != 32 or columns % COLUMNS:
        return None
    return "Q4_K" if grid.bits <= 4 else "Q5_K" if grid.bits == 5 else None


def blocks_of(quantized: Quantized, kind: str) -> Blocks:
    """The super-blocks of all rows."""
    groups = COLUMNS // SHAPES[kind].group
    codes_N = quantized.codes_BOI.reshape(-1, COLUMNS)
    params = quantized.params
    scale_NG = params.scale_BOG.reshape(-1, groups)
    if isinstance(quantized.grid, Kquant):
        assert params.unit_BOS is not None
        unit_N1 = params.unit_BOS.reshape(-1, 1)
        if params.zero_BOG is None or params.zero_unit_BOS is None:
            return Blocks(codes_N=codes_N, unit_N1=unit_N1, scale_NG=_places(scale_NG, unit_N1))
        zero_unit_N1 = params.zero_unit_BOS.reshape(-1, 1)
        return Blocks(
            codes_N=codes_N,
            unit_N1=unit_N1,
            scale_NG=_places(scale_NG, unit_N1),
            zero_unit_N1=zero_unit_N1,
            zero_NG=_places(params.zero_BOG.reshape(-1, groups), zero_unit_N1),
        )
    return _fitted(quantized, kind, codes_N, scale_NG)


def _places(value_NG: Tensor, unit_N1: Tensor) -> Tensor:
    return torch.where(unit_N1 != 0, value_NG / unit_N1, 0.0).round()


def _fitted(quantized: Quantized, kind: str, codes_N: Tensor, scale_NG: Tensor) -> Blocks:
    shape = SHAPES[kind]
    per_group = codes_N.float().unflatten(1, (-1, shape.group))
    zero_BOG = quantized.params.zero_BOG
    if zero_BOG is None:
        energy = per_group.square().sum(-1)
        unit_N1, k_NG = fitted_units(scale_NG, energy, shape.least, shape.most)
        return Blocks(codes_N=codes_N, unit_N1=unit_N1, scale_NG=k_NG)
    # Scales are positive in these types: codes of groups with a negative one count from the other end.
    highest, zero_NG = 2**shape.bits - 1, zero_BOG.reshape(scale_NG.shape).float()
    turned = scale_NG < 0
    per_group = torch.where(turned[..., None], highest - per_group, per_group)
    zero_NG = torch.where(turned, highest - zero_NG, zero_NG)
    scale_NG = scale_NG.abs()
    moments = (torch.full_like(scale_NG, shape.group), per_group.sum(-1), per_group.square().sum(-1))
    unit_N1, k_NG, zero_unit_N1, m_NG = fitted_offsets(scale_NG, scale_NG * zero_NG, moments, shape.most)
    codes = per_group.flatten(1).to(torch.uint8)
    return Blocks(codes_N=codes, unit_N1=unit_N1, scale_NG=k_NG, zero_unit_N1=zero_unit_N1, zero_NG=m_NG)


def encode_super(blocks: Blocks, kind: str) -> np.ndarray:
    """Bytes [N, 84 to 210] of super-blocks."""
    codes, d = blocks.codes_N.numpy(), _half(blocks.unit_N1)
    if blocks.zero_NG is None or blocks.zero_unit_N1 is None:
        return {"Q3_K": _q3_k, "Q6_K": _q6_k}[kind](d, blocks.scale_NG.to(torch.int8).numpy(), codes)
    units = np.concatenate([d, _half(blocks.zero_unit_N1)], axis=1)
    scale, zero = (one.to(torch.uint8).numpy() for one in (blocks.scale_NG, blocks.zero_NG))
    return {"Q2_K": _q2_k, "Q4_K": _q4_k, "Q5_K": _q5_k}[kind](units, scale, zero, codes)


def decoded_super(blocks: Blocks, kind: str) -> Float[Tensor, "N 256"]:
    """The values that the super-blocks stand for: (d k) q - c m."""
    size = SHAPES[kind].group
    value = (blocks.unit_N1 * blocks.scale_NG).repeat_interleave(size, dim=1) * blocks.codes_N.float()
    if blocks.zero_NG is None or blocks.zero_unit_N1 is None:
        return value
    return value - (blocks.zero_unit_N1 * blocks.zero_NG).repeat_interleave(size, dim=1)


def _half(unit_N1: Tensor) -> np.ndarray:
    return unit_N1.half().contiguous().numpy().view(np.uint8)


def _q2_k(units: np.ndarray, scale: np.ndarray, zero: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([scale | (zero << 4), _joined(codes.reshape(-1, 2, 4, 32), 2), units], axis=1)


def _q4_k(units: np.ndarray, scale: np.ndarray, zero: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([units, _six_bits(scale, zero), _joined(codes.reshape(-1, 4, 2, 32), 4)], axis=1)


def _q5_k(units: np.ndarray, scale: np.ndarray, zero: np.ndarray, codes: np.ndarray) -> np.ndarray:
    high = _joined((codes >> 4).reshape(-1, 1, 8, 32), 1)
    low = _joined((codes & 15).reshape(-1, 4, 2, 32), 4)
    return np.concatenate([units, _six_bits(scale, zero), high, low], axis=1)


def _six_bits(scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Eight pairs of numbers of six bits in 12 bytes; the high bits of the last four lie above those of the first."""
    first = [one[:, :4] | ((one[:, 4:] >> 4) << 6) for one in (scale, zero)]
    return np.concatenate([*first, (scale[:, 4:] & 15) | ((zero[:, 4:] & 15) << 4)], axis=1)


def _q3_k(d: np.ndarray, scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    raised, places = (codes + 4).astype(np.uint8), (scale + 32).astype(np.uint8)
    high = _joined((raised >> 2).reshape(-1, 1, 8, 32), 1)
    low = _joined((raised & 3).reshape(-1, 2, 4, 32), 2)
    scales = [_joined((places & 15).reshape(-1, 1, 2, 8), 4), _joined((places >> 4).reshape(-1, 1, 4, 4), 2)]
    return np.concatenate([high, low, *scales, d], axis=1)


def _q6_k(d: np.ndarray, scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
    raised = (codes + 32).astype(np.uint8)
    low = _joined((raised & 15).reshape(-1, 2, 2, 64), 4)
    high = _joined((raised >> 4).reshape(-1, 2, 4, 32), 2)
    return np.concatenate([low, high, scale.view(np.uint8), d], axis=1)


def _joined(parts: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [N, halves * width] of parts [N, halves, 8 / bits, width], the first in the lowest bits."""
    shifts = np.arange(0, bits * parts.shape[2], bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(parts), -1)
