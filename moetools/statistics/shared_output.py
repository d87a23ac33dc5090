"""How much of a block's output its shared experts carry."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio

_SUMS = ("shared_norm", "routed_norm", "whole_norm", "along", "energy")


class SharedOutput(Statistic):
    """Sums over the tokens x of each task g of the block's output y(x) = s(x) + r(x), shared and routed part.

    Blocks without shared experts, and shared experts that a family has outside of its MoE block, count no tokens.

    Quantities:
        shared_norm, routed_norm, whole_norm [G] fp64: sums of ||s||_2, ||r||_2 and ||y||_2.
        along, energy [G] fp64: sums of <s, y> and ||y||^2.
        tokens [G] int64.
        norm_share [G] fp64: shared_norm / whole_norm; with the routed part's it may add to more than 1.
        carried [G] fp64: along / energy; with the routed part's it adds to 1. Below 0 or over 1 where the parts cancel.
    """

    name = "shared_output"
    reads = frozenset({"shared"})
    reductions = {**dict.fromkeys(_SUMS, "sum"), "tokens": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        sums = {key: torch.zeros(shape.num_tasks, dtype=torch.float64, device=device) for key in _SUMS}
        return {**sums, "tokens": torch.zeros(shape.num_tasks, dtype=torch.int64, device=device)}

    def update(self, state: State, batch: RoutedBatch) -> None:
        if batch.shared_TD is None or batch.routed_TD is None:
            return
        shared_TD, routed_TD = batch.shared_TD.float(), batch.routed_TD.float()
        whole_TD = shared_TD + routed_TD
        for key, part_TD in (("shared_norm", shared_TD), ("routed_norm", routed_TD), ("whole_norm", whole_TD)):
            batch.add_by_task(state[key], torch.linalg.vector_norm(part_TD, dim=1))
        batch.add_by_task(state["along"], (shared_TD * whole_TD).sum(1))
        batch.add_by_task(state["energy"], whole_TD.square().sum(1))
        batch.add_by_task(state["tokens"], torch.ones_like(batch.task_T))

    def finalize(self, state: State) -> State:
        return {
            **state,
            "norm_share": ratio(state["shared_norm"], state["whole_norm"]),
            "carried": ratio(state["along"], state["energy"]),
        }


STATISTIC = SharedOutput()
