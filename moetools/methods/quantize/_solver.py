"""GPTQ's pass over the columns, for B matrices at once.

Weights are held transposed here ([B, I, O]), so that a column of all matrices is one contiguous slice.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.grids.base import Grid, Params

_MOST_DAMPING = 1e3


@dataclass(frozen=True, kw_only=True)
class Factor:
    """Triangular factor of damped Hessians.

    Attributes:
        upper_BII: U, upper triangular, with U^T U = H^-1.
        damping: added to H, as a share of its mean diagonal, per matrix.
        condition: (max R_ii / min R_ii)^2 with R = U^-1: a lower bound of the condition number, per matrix.
    """

    upper_BII: Float[Tensor, "B I I"]
    damping: list[float]
    condition: list[float]


def regular(hessian_BII: Float[Tensor, "B I I"]) -> Float[Tensor, "B I I"]:
    """The Hessians, symmetric, in fp32, with the mean diagonal in place of diagonals that are zero.

    A column that no input ever reached has no say in any other; it is then rounded to nearest. A matrix without any
    input gets the identity.
    """
    hessian = hessian_BII.float()
    hessian = (hessian + hessian.mT) / 2
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    alive = diagonal > 0
    mean = diagonal.sum(1) / alive.sum(1).clamp(min=1)
    filler = torch.where(mean > 0, mean, 1.0)[:, None]
    hessian.diagonal(dim1=1, dim2=2).copy_(torch.where(alive, diagonal, filler))
    return hessian


def damped(hessian_BII: Float[Tensor, "B I I"], damping_B: Float[Tensor, "B"]) -> Float[Tensor, "B I I"]:
    """H + damping * mean(diag H) * I."""
    result = hessian_BII.clone()
    diagonal = result.diagonal(dim1=1, dim2=2)
    diagonal += (damping_B * diagonal.mean(1)).to(result.dtype)[:, None]
    return result


def factorize(hessian_BII: Float[Tensor, "B I I"], damping: float) -> Factor:
    """Factor of H + damping * mean(diag H) * I, one Cholesky decomposition per matrix.

    H in reversed order is L L^T, so H = R R^T with R = L in reversed order, upper triangular, and U = R^-1.
    Where fp32 is too coarse the matrix is decomposed in fp64; where H is not positive definite even so, the damping of
    that matrix grows tenfold until it is (rounding noise in H, or an H that is no Gram).
    """
    batch, columns, _ = hessian_BII.shape
    amount_B = torch.full((batch,), damping, device=hessian_BII.device)
    flipped = damped(hessian_BII, amount_B).flip(1, 2)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    for index in failed.nonzero()[:, 0].tolist():
        one = slice(index, index + 1)
        lower[one], amount_B[one] = _robust_factor(hessian_BII[one].double(), damping)
    root = lower.flip(1, 2)
    spread = root.diagonal(dim1=1, dim2=2)
    condition = (spread.amax(1) / spread.amin(1)).square()
    eye = torch.eye(columns, device=root.device, dtype=root.dtype).expand_as(root)
    upper = torch.linalg.solve_triangular(root, eye, upper=True)
    return Factor(upper_BII=upper, damping=amount_B.tolist(), condition=condition.tolist())


def _robust_factor(hessian_1II: Tensor, damping: float) -> tuple[Tensor, float]:
    while damping <= _MOST_DAMPING:
        amount = torch.full((1,), damping, device=hessian_1II.device)
        lower, failed = torch.linalg.cholesky_ex(damped(hessian_1II, amount).flip(1, 2))
        if not failed.item():
            return lower.float(), damping
        damping = max(10 * damping, 1e-4)
    # Nothing but noise: columns are then independent of each other.
    diagonal = hessian_1II.diagonal(dim1=1, dim2=2).clamp(min=1e-30)
    return torch.diag_embed(diagonal.flip(1).sqrt()).float(), damping


def activation_order(hessian_BII: Float[Tensor, "B I I"]) -> Int[Tensor, "B I"]:
    """Columns of each matrix by falling diag(H): what matters most is rounded while all others can make up."""
    return hessian_BII.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def permuted(hessian_BII: Float[Tensor, "B I I"], order_BI: Int[Tensor, "B I"]) -> Float[Tensor, "B I I"]:
    """H[order][:, order] of each matrix."""
    rows = hessian_BII.gather(1, order_BI[:, :, None].expand_as(hessian_BII))
    return rows.gather(2, order_BI[:, None, :].expand_as(hessian_BII))


def compensated_codes(
    weight_BOI: Float[Tensor, "B O I"],
    grid: Grid,
    params: Params,
    upper_BII: Float[Tensor, "B I I"],
    order_BI: Int[Tensor, "B I"],
    block_size: int,
) -> Tensor:
    """Codes [B, O, I]: columns are rounded in the given order, each error pushed into the columns not yet rounded.

    e_j = (w_j - q_j) / U_jj;  w_k -= U_jk e_j for all k > j, with U of the permuted H. Groups and scales are those of
    the columns' own places (static groups). Inside a block of columns updates are applied at once, to the columns
    behind it all together (GPTQ, arXiv 2210.17323, section 3.3).
    """
    batch, rows, columns = weight_BOI.shape
    by_column = order_BI[:, :, None].expand(batch, columns, rows)
    weight_BIO = weight_BOI.mT.gather(1, by_column)
    group_BI = grid.group_of_column(columns, weight_BOI.device)[order_BI]
    scale_BIO, zero_BIO = _per_column(params, group_BI)
    codes_BIO: Tensor | None = None
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block_BCO = weight_BIO[:, start:end]
        errors_BCO = torch.empty_like(block_BCO)
        for place, column in enumerate(range(start, end)):
            earlier_B1C = upper_BII[:, start:column, column, None].mT
            wanted = torch.baddbmm(block_BCO[:, place, None], earlier_B1C, errors_BCO[:, :place], alpha=-1).mT
            zero = None if zero_BIO is None else zero_BIO[:, column, :, None]
            here = Params(scale_BOG=scale_BIO[:, column, :, None], zero_BOG=zero)
            code = grid.encode(wanted, here)
            errors_BCO[:, place] = (wanted - grid.decode(code, here))[..., 0] / upper_BII[:, column, column, None]
            if codes_BIO is None:
                codes_BIO = torch.empty(batch, columns, rows, dtype=code.dtype, device=code.device)
            codes_BIO[:, column] = code[..., 0]
        weight_BIO[:, end:] -= upper_BII[:, start:end, end:].mT @ errors_BCO
    assert codes_BIO is not None
    return torch.empty_like(codes_BIO).scatter_(1, by_column, codes_BIO).mT.contiguous()


def _per_column(params: Params, group_BI: Tensor) -> tuple[Tensor, Tensor | None]:
    index = group_BI[:, :, None].expand(-1, -1, params.scale_BOG.shape[1])
    zero = None if params.zero_BOG is None else params.zero_BOG.mT.gather(1, index)
    return params.scale_BOG.mT.gather(1, index), zero
