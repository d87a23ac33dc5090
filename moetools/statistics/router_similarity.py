"""Similarity of experts in the router's eyes: correlation of their logits over the tokens."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio

_CONSTANT = 1e-12
"""Variance below this share of the mean square is rounding: the logits are constant and correlate with nothing."""


class RouterSimilarity(Statistic):
    """r_ij = Pearson correlation of the raw router logits l_i and l_j over all tokens, chosen or not.

    r_ij = C_ij / sqrt(C_ii C_jj) with C_ij = sum over tokens of (l_i - mean l_i)(l_j - mean l_j): the cosine of the two
    experts' logit profiles after centring them. Uncentred, a bias common to all experts would make them all alike.

    Quantities:
        product [E, E] fp64: sum over tokens of l_i l_j.
        total [E] fp64: sum over tokens of l_i.
        tokens [] int64: number of tokens.
        similarity [E, E] fp64: r_ij; 0 where a logit never varied.

    Source: router-logit similarity, M-SMoE (arXiv 2310.01334, section 3.1) and REAM (arXiv 2604.04356); centring ours.
    """

    name = "router_similarity"
    reductions = {"product": "sum", "total": "sum", "tokens": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        experts = shape.num_experts
        return {
            "product": torch.zeros(experts, experts, dtype=torch.float64, device=device),
            "total": torch.zeros(experts, dtype=torch.float64, device=device),
            "tokens": torch.zeros((), dtype=torch.int64, device=device),
        }

    def update(self, state: State, batch: RoutedBatch) -> None:
        # fp64 throughout: `finalize` takes the difference of two sums that may be much larger than it.
        logits_TE = batch.router_logits_TE.double()
        state["product"] += logits_TE.T @ logits_TE
        state["total"] += logits_TE.sum(0)
        state["tokens"] += len(logits_TE)

    def finalize(self, state: State) -> State:
        product_EE, total_E = state["product"], state["total"]
        mean_E = ratio(total_E, state["tokens"])
        covariance_EE = product_EE - total_E[:, None] * mean_E
        square_E, variance_E = product_EE.diagonal(), covariance_EE.diagonal()
        deviation_E = torch.where(variance_E > _CONSTANT * square_E, variance_E, 0.0).sqrt()
        return {**state, "similarity": ratio(covariance_EE, deviation_E[:, None] * deviation_E)}


STATISTIC = RouterSimilarity()
