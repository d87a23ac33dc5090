"""EAN: expert activation norm, the sum of each expert's output norms."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic


class Ean(Statistic):
    """EAN_e = sum over x in X_e of ||f_e(x)||_2: X_e the tokens routed to expert e, f_e(x) [D] its ungated output.

    A sum, not a mean: it grows with the load of the expert.

    Quantities:
        norm_per_task [G, E] fp64: the sum over the tokens of each task.
        norm [E] fp64: EAN_e, the sum over all tasks.

    Source: Jaiswal et al. (arXiv 2504.05586); a baseline in REAP (arXiv 2510.13999).
    """

    name = "ean"
    reads = frozenset({"output"})
    reductions = {"norm_per_task": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        size = (shape.num_tasks, shape.num_experts)
        return {"norm_per_task": torch.zeros(size, dtype=torch.float64, device=device)}

    def update(self, state: State, batch: RoutedBatch) -> None:
        batch.add_by_task_and_expert(state["norm_per_task"], batch.slots.output_norm_S)

    def finalize(self, state: State) -> State:
        return {**state, "norm": state["norm_per_task"].sum(0)}


STATISTIC = Ean()
