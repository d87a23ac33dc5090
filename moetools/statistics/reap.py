"""REAP saliency: mean router-weighted output norm of each expert over the tokens routed to it."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class Reap(Statistic):
    """S_e = 1 / |X_e| * sum over x in X_e of g_e(x) * ||f_e(x)||_2, with X_e the tokens routed to expert e.

    g_e(x) is the routing weight the model used (after its top-k normalisation and scaling), f_e(x) the expert's ungated
    output [D]. An expert that was never routed has S_e = 0. S_e pools the tasks: sum over all tasks / their slots.

    Quantities:
        weighted_norm [G, E] fp64: sum of g_e(x) * ||f_e(x)||_2 per task.
        slots [G, E] int64: |X_e| per task.
        saliency [E] fp64: S_e.
        saliency_per_task [G, E] fp64: S_e over the tokens of one task.

    Source: REAP (arXiv 2510.13999).
    """

    name = "reap"
    reads = frozenset({"output"})
    reductions = {"weighted_norm": "sum", "slots": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        size = (shape.num_tasks, shape.num_experts)
        return {
            "weighted_norm": torch.zeros(size, dtype=torch.float64, device=device),
            "slots": torch.zeros(size, dtype=torch.int64, device=device),
        }

    def update(self, state: State, batch: RoutedBatch) -> None:
        slots = batch.slots
        batch.add_by_task_and_expert(state["weighted_norm"], slots.weight_S * slots.output_norm_S)
        batch.add_by_task_and_expert(state["slots"], torch.ones_like(batch.cell_S))

    def finalize(self, state: State) -> State:
        norm_GE, slots_GE = state["weighted_norm"], state["slots"]
        return {
            **state,
            "saliency": ratio(norm_GE.sum(0), slots_GE.sum(0)),
            "saliency_per_task": ratio(norm_GE, slots_GE),
        }


STATISTIC = Reap()
