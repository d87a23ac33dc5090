"""EASY-EP: routed output of each expert, counted where the block turns the hidden state."""

import torch
from torch.nn import functional

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic


class EasyEp(Statistic):
    """S_e = sum over x in X_e of g_e(x) * ||f_e(x)||_2 * max(1 - cos(x, x + y(x)), 0).

    X_e are the tokens routed to expert e, g_e(x) the routing weight the model used, f_e(x) [D] the expert's ungated
    output, y(x) = sum over the chosen k of g_k(x) f_k(x) the block's routed output. A token counts for what its block
    changes: where adding y leaves the direction of the hidden state as it was, the experts did little.

    x is the block's input AFTER its norm, because that is what the forward core shows a statistic; the paper compares
    the residual stream before and after. The residual stream is usually longer than its normed copy, so our cosine
    falls further; the order of tokens within a layer, which is what the weight is for, is kept up to that.

    Quantities:
        score_per_task [G, E] fp64: the sum over the tokens of each task.
        score [E] fp64: S_e, the sum over all tasks.

    Source: EASY-EP (arXiv 2504.06792).
    """

    name = "easy_ep"
    reads = frozenset({"output"})
    reductions = {"score_per_task": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        size = (shape.num_tasks, shape.num_experts)
        return {"score_per_task": torch.zeros(size, dtype=torch.float64, device=device)}

    def update(self, state: State, batch: RoutedBatch) -> None:
        slots = batch.slots
        turn_T = torch.zeros(len(batch.task_T), dtype=torch.float64, device=batch.task_T.device)
        for rows, slot_NK, output_NKD in batch.outputs_by_token():
            routed_ND = torch.bmm(slots.weight_S[slot_NK].unsqueeze(1), output_NKD).squeeze(1)
            # fp64: 1 - cos of nearly parallel vectors has no digits left in fp32.
            before_ND = batch.hidden_TD[rows].double()
            turn_T[rows] = (1 - functional.cosine_similarity(before_ND, before_ND + routed_ND, dim=1)).clamp(min=0)
        value_S = slots.weight_S * slots.output_norm_S * turn_T[slots.token_S]
        batch.add_by_task_and_expert(state["score_per_task"], value_S)

    def finalize(self, state: State) -> State:
        return {**state, "score": state["score_per_task"].sum(0)}


STATISTIC = EasyEp()
