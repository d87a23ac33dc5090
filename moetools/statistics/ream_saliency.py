"""REAM saliency: mean output norm of each expert, weighted twice by the router, over the tokens routed to it."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class ReamSaliency(Statistic):
    """S_e = 1 / |X_e| * sum over x in X_e of g_e(x)^2 * ||f_e(x)||_2, with X_e the tokens routed to expert e.

    REAP's saliency of the gated output g_e(x) f_e(x), so that the gate counts twice, as in REAM's published code, which
    gates the outputs before it measures their saliency. g_e(x) is the routing weight the model used, f_e(x) the
    expert's ungated output [D]. An expert that was never routed has S_e = 0. Tasks are pooled by tokens.

    Quantities:
        weighted_norm [E] fp64: the sum.
        slots [E] int64: |X_e|.
        saliency [E] fp64: S_e.

    Source: REAM (arXiv 2604.04356), published code.
    """

    name = "ream_saliency"
    reads = frozenset({"output"})
    reductions = {"weighted_norm": "sum", "slots": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        return {
            "weighted_norm": torch.zeros(shape.num_experts, dtype=torch.float64, device=device),
            "slots": torch.zeros(shape.num_experts, dtype=torch.int64, device=device),
        }

    def update(self, state: State, batch: RoutedBatch) -> None:
        slots = batch.slots
        value_S = slots.weight_S.square() * slots.output_norm_S
        state["weighted_norm"].index_add_(0, slots.expert_S, value_S.double())
        state["slots"] += slots.counts_E

    def finalize(self, state: State) -> State:
        return {**state, "saliency": ratio(state["weighted_norm"], state["slots"])}


STATISTIC = ReamSaliency()
