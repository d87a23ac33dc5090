"""Mean of matrices inside their shared, truncated column space (Sub-MoE, arXiv 2506.23266, section 3)."""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.methods.base import ExpertDecision, combine_experts, weighted_mean


def subspace_mean(
    tensors: Sequence[Float[Tensor, "O I"]], shares: Sequence[float], rank: float
) -> Float[Tensor, "O I"]:
    """U_r S_r (sum_j shares[j] V_j,r)^T of the joint decomposition [W_1 | ... | W_n] = U S [V_1 | ... | V_n]^T, fp32.

    That equals U_r U_r^T sum_j shares[j] W_j: the weighted mean, projected on the r directions in which the members
    together are largest. U comes from the eigenvectors of sum_j W_j W_j^T [O, O], in fp64, so that no wide matrix is
    decomposed. At full rank it is the weighted mean itself.

    Args:
        shares: weights of the members, summing to 1.
        rank: r as a share of the largest rank min(O, n I), rounded up, 0 < rank <= 1.
    """
    mean_OI = weighted_mean(tensors, shares)
    rows, columns = mean_OI.shape
    most = min(rows, columns * len(tensors))
    kept = max(1, -int(-most * rank // 1))
    if kept >= most:
        return mean_OI
    gram_OO = torch.zeros(rows, rows, dtype=torch.float64, device=mean_OI.device)
    for tensor in tensors:
        gram_OO += tensor.double() @ tensor.double().T
    # Ascending eigenvalues: the last columns span the subspace.
    basis_Or = torch.linalg.eigh(gram_OO).eigenvectors[:, rows - kept :]
    return (basis_Or @ (basis_Or.T @ mean_OI.double())).float()


def combine_in_subspace(weights: LayerWeights, decision: ExpertDecision, rank: float) -> LayerWeights:
    """`combine_experts` with the gate, up and down matrices of every cluster averaged by `subspace_mean`."""
    return combine_experts(weights, decision, projections=functools.partial(subspace_mean, rank=rank))
