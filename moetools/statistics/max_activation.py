"""Largest output activation of each expert, to recognise the few experts a model cannot lose."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic


class MaxActivation(Statistic):
    """peak_e = max over x in X_e and d of |f_e(x)_d|: X_e the tokens routed to e, f_e(x) [D] its ungated output.

    Quantities:
        peak [E] fp32: the maximum; 0 for an expert that was never routed.

    Source: "super experts" (arXiv 2507.23279), the guard in REAP's published code (arXiv 2510.13999).
    """

    name = "max_activation"
    reads = frozenset({"output"})
    reductions = {"peak": "max"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        return {"peak": torch.zeros(shape.num_experts, dtype=torch.float32, device=device)}

    def update(self, state: State, batch: RoutedBatch) -> None:
        output_SD = batch.slots.output_SD
        assert output_SD is not None, "max_activation reads 'output'"
        # Two reductions read the outputs twice but, unlike abs(), write no second [S, D]; three times faster on CPU.
        peak_S = torch.maximum(output_SD.amax(1), -output_SD.amin(1)).float()
        state["peak"].scatter_reduce_(0, batch.slots.expert_S, peak_S, reduce="amax")


STATISTIC = MaxActivation()
