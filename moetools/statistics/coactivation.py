"""Co-activation: how often two experts are chosen for the same token."""

import torch
from torch import Tensor

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class Coactivation(Statistic):
    """Counts over ALL unordered pairs of experts a token chose, not only over neighbours in the ranking.

    N_ij = number of tokens that chose both i and j; N_i = number of tokens that chose i; T = number of tokens.

    Quantities:
        pairs [E, E] int64: N_ij, symmetric, zero diagonal.
        chosen [E] int64: N_i.
        tokens [] int64: T.
        conditional [E, E] fp64: N_ij / N_i, the probability of j given i; rows sum to K - 1.
        lift [E, E] fp64: N_ij * T / (N_i * N_j); 1 when i and j are chosen independently.
    """

    name = "coactivation"
    reductions = {"pairs": "sum", "chosen": "sum", "tokens": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        return {
            "pairs": zeros(shape.num_experts, shape.num_experts),
            "chosen": zeros(shape.num_experts),
            "tokens": zeros(),
        }

    def update(self, state: State, batch: RoutedBatch) -> None:
        chosen_TE = torch.zeros_like(batch.router_logits_TE, dtype=torch.float32)
        chosen_TE.scatter_(1, batch.topk_index_TK.long(), 1.0)
        # Zeros and ones: the fp32 product is exact up to 2^24 tokens a batch.
        pairs_EE = (chosen_TE.T @ chosen_TE).round().long()
        state["chosen"] += pairs_EE.diagonal()
        state["pairs"] += pairs_EE.fill_diagonal_(0)
        state["tokens"] += len(batch.topk_index_TK)

    def finalize(self, state: State) -> State:
        pairs_EE, chosen_E = state["pairs"], state["chosen"]
        return {
            **state,
            "conditional": ratio(pairs_EE, chosen_E[:, None]),
            "lift": ratio(pairs_EE * state["tokens"].double(), chosen_E[:, None].double() * chosen_E),
        }


STATISTIC = Coactivation()
