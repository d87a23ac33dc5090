"""Similarity of experts by what they add to the same tokens: inner products of their gated outputs."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class GatedSimilarity(Statistic):
    """P_ij = sum over the tokens x routed to both i and j of g_i(x) g_j(x) <f_i(x), f_j(x)>.

    g_e(x) is the routing weight the model used, f_e(x) [D] the expert's ungated output. With every expert's gated
    outputs over all tokens strung into one vector v_e [T * D], zero where e is not routed, P_ij = <v_i, v_j> and P_ii =
    ||v_i||^2. The cosine is that of v_i and v_j: pairs that rarely serve the same tokens are dissimilar. The tokens' K
    routed outputs are all that is read; no expert runs on other tokens.

    Quantities:
        product [E, E] fp64: P_ij, symmetric.
        energy [E] fp64: P_ii, the sum of g_i(x)^2 ||f_i(x)||^2.
        cosine [E, E] fp64: P_ij / sqrt(P_ii P_jj); 0 for an expert without output.

    Source: the gated similarity of REAM (arXiv 2604.04356), whose code averages each token's cosine instead, which
    counts a token with negligible gates like any other.
    """

    name = "gated_similarity"
    reads = frozenset({"output"})
    reductions = {"product": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        size = (shape.num_experts, shape.num_experts)
        return {"product": torch.zeros(size, dtype=torch.float64, device=device)}

    def update(self, state: State, batch: RoutedBatch) -> None:
        slots, experts = batch.slots, len(batch.slots.counts_E)
        for _, slot_NK, output_NKD in batch.outputs_by_token():
            weight_NK, expert_NK = slots.weight_S[slot_NK], slots.expert_S[slot_NK]
            gated_NKD = output_NKD.mul_(weight_NK.unsqueeze(2))
            product_NKK = torch.bmm(gated_NKD, gated_NKD.transpose(1, 2))
            cell_NKK = expert_NK.unsqueeze(2) * experts + expert_NK.unsqueeze(1)
            state["product"].view(-1).index_add_(0, cell_NKK.flatten(), product_NKK.flatten().double())

    def finalize(self, state: State) -> State:
        product_EE = state["product"]
        energy_E = product_EE.diagonal().clone()
        norm_E = energy_E.sqrt()
        return {**state, "energy": energy_E, "cosine": ratio(product_EE, norm_E[:, None] * norm_E)}


STATISTIC = GatedSimilarity()
