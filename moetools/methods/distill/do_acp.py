"""DO-ACP: experts with large weighted activations that point in different directions, side by side."""

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.weights import WideExpert
from moetools.methods.distill.base import DenseInit, MoeView, chosen_experts, contribution, output_gram

_RIDGE = 1e-3


class DiversityContribution(DenseInit):
    """A greedy set S of experts that maximises log det(K_S + lambda I), concatenated and scaled.

    K_ij = sqrt(ACP_i ACP_j) G_ij, G_ij = E <f_i(x), f_j(x)>, ACP_e = CP_e * sqrt(G_ee); lambda is 1e-3 of the mean of
    K's diagonal. Source: arXiv 2605.28207.
    """

    name = "do-acp"

    def build(self, view: MoeView) -> WideExpert:
        gram_EE = output_gram(view)
        root_E = (contribution(view) * gram_EE.diagonal().sqrt()).sqrt()
        return chosen_experts(view, greedy_determinant(root_E[:, None] * gram_EE * root_E))


def greedy_determinant(kernel_EE: Float[Tensor, "E E"]) -> list[int]:
    """All experts in the order in which each adds most to log det(K_S + lambda I).

    The gain of i is log of the pivot of i in a Cholesky factorization of the chosen ones: their projection is taken out
    of the rest, one at a time.
    """
    ridge = _RIDGE * kernel_EE.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    rest_EE = kernel_EE.double() + ridge * torch.eye(len(kernel_EE), dtype=torch.float64)
    order: list[int] = []
    for _ in range(len(rest_EE)):
        pivot_E = rest_EE.diagonal().clone()
        pivot_E[order] = -torch.inf
        best = int(pivot_E.argmax())
        order.append(best)
        row_E = rest_EE[best].clone()
        rest_EE = rest_EE - torch.outer(row_E, row_E) / row_E[best].clamp_min(torch.finfo(torch.float64).tiny)
    return order


METHOD = DiversityContribution()
