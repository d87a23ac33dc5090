"""GGUF's super-blocks of 256 columns, Q3_K and Q6_K: our codes, and our scales as integers times one fp16 number.

Source: `block_q3_K` and `block_q6_K` in ggml's `ggml-common.h`.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

COLUMNS, GROUP = 256, 16
_LIMITS = {"Q3_K": (-32, 31), "Q6_K": (-128, 127)}
"""Of the integers that stand for scales."""
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)


def fitted_scales(codes_N: Tensor, scale_NG: Tensor, kind: str) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N G"]]:
    """The d and integers k that minimise sum_g e_g (d k_g - s_g)^2, e_g the sum of the group's squared codes.

    That is the squared error of the weights, because codes stay. Tries ranges of k that the extreme scale reaches, each
    followed by the closed form of d for its k.

    Args:
        codes_N: codes [N, 256].
        scale_NG: their scales [N, 16].

    Returns:
        d, already rounded to fp16, and k, both fp32.
    """
    low, high = _LIMITS[kind]
    energy_NG = codes_N.float().unflatten(1, (-1, GROUP)).square().sum(-1)
    # Scales of groups that are all zero do not matter.
    scale_NG = torch.where(energy_NG > 0, scale_NG.float(), 0.0)
    extreme = scale_NG.gather(1, scale_NG.abs().argmax(1, keepdim=True))
    best_error = torch.full_like(extreme, torch.inf)
    best_d, best_k = torch.zeros_like(extreme), torch.zeros_like(scale_NG)
    for reached in [limit * share for limit in (low, high) for share in _SHARES]:
        d = (extreme / reached).half().float()
        for _ in range(2):
            k_NG = torch.where(d != 0, scale_NG / d, 0.0).round().clamp(low, high)
            error = (energy_NG * (d * k_NG - scale_NG).square()).sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_d, best_k = torch.where(better, d, best_d), torch.where(better, k_NG, best_k)
            squares = (energy_NG * k_NG.square()).sum(1, keepdim=True)
            d = torch.where(squares > 0, (energy_NG * k_NG * scale_NG).sum(1, keepdim=True) / squares, 0.0)
            d = d.half().float()
    return best_d, best_k


def encode_super(codes_N: Tensor, scale_NG: Tensor, kind: str) -> np.ndarray:
    """Bytes [N, 110 or 210] of super-blocks; arguments as in `fitted_scales`."""
    d, k_NG = fitted_scales(codes_N, scale_NG, kind)
    pack = {"Q3_K": _q3_k, "Q6_K": _q6_k}[kind]
    return pack(d.half().numpy().view(np.uint8), k_NG.to(torch.int8).numpy(), codes_N.numpy())


def decoded_super(codes_N: Tensor, scale_NG: Tensor, kind: str) -> Float[Tensor, "N 256"]:
    """The values that the super-blocks stand for: (d k) q."""
    d, k_NG = fitted_scales(codes_N, scale_NG, kind)
    return (d * k_NG).repeat_interleave(GROUP, dim=1) * codes_N.float()


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
