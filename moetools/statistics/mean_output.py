"""Mean output vector of each expert over the tokens routed to it."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class MeanOutput(Statistic):
    """m_e = 1 / |X_e| * sum over x in X_e of f_e(x), X_e the tokens routed to e, f_e(x) [D] its ungated output.

    Quantities:
        total [E, D] fp64: the sum; every batch is summed in fp32 first.
        slots [E] int64: |X_e|.
        mean [E, D] fp64: m_e; zeros for an expert that was never routed.
    """

    name = "mean_output"
    reads = frozenset({"output"})
    reductions = {"total": "sum", "slots": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        return {
            "total": torch.zeros(shape.num_experts, shape.hidden_size, dtype=torch.float64, device=device),
            "slots": torch.zeros(shape.num_experts, dtype=torch.int64, device=device),
        }

    def update(self, state: State, batch: RoutedBatch) -> None:
        output_SD = batch.slots.output_SD
        assert output_SD is not None, "mean_output reads 'output'"
        state["total"] += batch.slots.sum_by_expert(output_SD)
        state["slots"] += batch.slots.counts_E

    def finalize(self, state: State) -> State:
        return {**state, "mean": ratio(state["total"], state["slots"][:, None])}


STATISTIC = MeanOutput()
