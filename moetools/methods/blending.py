"""Hessians of experts that saw few tokens: their own, pulled towards what is known about the layer."""

from dataclasses import replace

import torch
from jaxtyping import Float, Num
from torch import Tensor

from moetools.methods.quantize.base import Inputs, trace

STRENGTH = 1.0
"""Pseudo-slots of the prior per input column; chosen on held-out tokens (docs/benchmarks.md)."""


def layer_hessian(inputs: Inputs) -> Float[Tensor, "I I"]:
    """sum_e n_e H_e / sum_e n_e: the mean over all slots of the layer. For inputs that experts share (gate, up)."""
    count_B = inputs.count_B.to(inputs.hessian_BII)
    return torch.einsum("b,bij->ij", count_B, inputs.hessian_BII) / count_B.sum().clamp(min=1)


def blend(inputs: Inputs, prior: Float[Tensor, "*B I I"] | None = None, *, strength: float = STRENGTH) -> Inputs:
    """H_e <- (n_e H_e + k P_e) / (n_e + k) with k = strength * I pseudo-slots.

    The error of a covariance measured on n samples of I correlated inputs falls as I / n, so the prior's weight is a
    number of slots per column: an expert with many more slots than that keeps its own Hessian, a rare one takes the
    prior's. Without a prior it is the expert's own diagonal: neurons of different experts have nothing in common, so
    for intermediates (down projections) only the correlations are distrusted, not the second moments.

    Args:
        inputs: of the experts of one layer.
        prior: P, one for all experts ([I, I], usually `layer_hessian`) or one for each ([B, I, I]); scaled here to the
            trace of H_e, because only the shape of a Hessian matters. An expert without slots gets it as it is.
        strength: k / I.
    """
    hessian = inputs.hessian_BII
    columns = hessian.shape[1]
    own = trace(hessian)
    if prior is None:
        shape = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    else:
        scale = torch.where(own > 0, own / trace(prior).clamp(min=torch.finfo(hessian.dtype).tiny), 1.0)
        shape = prior.expand_as(hessian) * scale[:, None, None]
    pseudo = strength * columns
    share = (pseudo / (inputs.count_B.to(hessian) + pseudo))[:, None, None] if pseudo else 0.0
    return replace(inputs, hessian_BII=hessian + share * (shape - hessian))


def blend_moments(
    moment_BI: Float[Tensor, "B I"], count_B: Num[Tensor, "B"], *, strength: float = STRENGTH
) -> Float[Tensor, "B I"]:
    """The diagonals that `blend` with `layer_hessian` gives, from the diagonals alone.

    Args:
        moment_BI: mean over slots of x_i^2, by expert; zeros without slots.
        count_B: slots.
    """
    count_B1 = count_B.to(moment_BI)[:, None]
    prior_I = (count_B1 * moment_BI).sum(0) / count_B1.sum().clamp(min=1)
    own_B1 = moment_BI.sum(1, keepdim=True)
    scale_B1 = torch.where(own_B1 > 0, own_B1 / prior_I.sum().clamp(min=torch.finfo(moment_BI.dtype).tiny), 1.0)
    pseudo = strength * moment_BI.shape[1]
    share_B1 = pseudo / (count_B1 + pseudo) if pseudo else torch.zeros_like(count_B1)
    return moment_BI + share_B1 * (prior_I * scale_B1 - moment_BI)
