"""Succession: which expert follows which, from one MoE layer to the next."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class Succession(Statistic):
    """Counts of the pairs (expert i of the MoE layer before, expert j of this one) that serve the same token.

    N_ij = tokens that chose i before and j now, B_i = tokens that chose i before, N_j = tokens that chose j now, T =
    tokens. All K * K pairs of a token count. The first MoE layer follows nobody: everything is 0 there.

    Quantities:
        pairs [E, E] int64: N_ij; rows are the layer before.
        before, chosen [E] int64: B_i and N_j.
        tokens [] int64: T.
        conditional [E, E] fp64: N_ij / B_i, the probability of j behind i; rows sum to K.
        lift [E, E] fp64: N_ij * T / (B_i * N_j); 1 when the layers choose independently.
        information [] fp64: sum p_ij ln(p_ij / (p_i p_j)) in nats with p_ij = N_ij / (T K^2): what one choice before
            says about one choice now.
    """

    name = "succession"
    reads = frozenset({"previous"})
    reductions = {"pairs": "sum", "before": "sum", "chosen": "sum", "tokens": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        experts = shape.num_experts
        return {"pairs": zeros(experts, experts), "before": zeros(experts), "chosen": zeros(experts), "tokens": zeros()}

    def update(self, state: State, batch: RoutedBatch) -> None:
        if batch.previous_TK is None:
            return
        experts = batch.router_logits_TE.shape[1]
        before_TE, chosen_TE = _marks(batch.previous_TK, experts), _marks(batch.topk_index_TK, experts)
        # Zeros and ones: the fp32 product is exact up to 2^24 tokens a batch.
        state["pairs"] += (before_TE.T @ chosen_TE).round().long()
        state["before"] += before_TE.sum(0).long()
        state["chosen"] += chosen_TE.sum(0).long()
        state["tokens"] += len(chosen_TE)

    def finalize(self, state: State) -> State:
        pairs_EE, before_E, chosen_E = state["pairs"], state["before"], state["chosen"]
        expected_EE = before_E[:, None].double() * chosen_E
        lift_EE = ratio(pairs_EE * state["tokens"].double(), expected_EE)
        joint_EE = ratio(pairs_EE, pairs_EE.sum())
        information = torch.special.xlogy(joint_EE, lift_EE).sum().clamp(min=0)
        conditional_EE = ratio(pairs_EE, before_E[:, None])
        return {**state, "conditional": conditional_EE, "lift": lift_EE, "information": information}


def _marks(index_TK: Int[Tensor, "T K"], experts: int) -> Float[Tensor, "T E"]:
    """1 where the token chose the expert."""
    return torch.zeros(len(index_TK), experts, device=index_TK.device).scatter_(1, index_TK.long(), 1.0)


STATISTIC = Succession()
