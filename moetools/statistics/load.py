"""Expert load: how many slots each expert received, per task."""

import torch
from torch import Tensor

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class Load(Statistic):
    """Slots per expert and task: n_ge = number of (token of task g, rank k) pairs whose k-th choice is expert e.

    Quantities:
        slots [G, E] int64: n_ge.
        tokens [G] int64: tokens of each task.
        share [G, E] fp64: n_ge / (T_g * K), the fraction f_e of the task's slots; sums to 1 over e.
    """

    name = "load"
    reductions = {"slots": "sum", "tokens": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.int64, device=device)

        return {"slots": zeros(shape.num_tasks, shape.num_experts), "tokens": zeros(shape.num_tasks)}

    def update(self, state: State, batch: RoutedBatch) -> None:
        batch.add_by_task_and_expert(state["slots"], torch.ones_like(batch.cell_S))
        batch.add_by_task(state["tokens"], torch.ones_like(batch.task_T))

    def finalize(self, state: State) -> State:
        slots_GE = state["slots"]
        return {**state, "share": ratio(slots_GE, slots_GE.sum(1, keepdim=True))}


STATISTIC = Load()
