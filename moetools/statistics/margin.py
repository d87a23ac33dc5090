"""How close the routers' choices are: what rounding, quantization or a little training would turn over."""

import torch
from torch import Tensor

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio

BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Logit differences below which tokens are counted."""
_BF16_STEP = 2.0**-8
"""Largest relative distance of two neighbouring bfloat16 numbers."""


class Margin(Statistic):
    """Margin m = (least logit of the chosen experts) - (largest logit of the others), per token.

    It is what must be added to one logit for another expert to be chosen. Where a router chooses by more than its
    logits (a correction bias, groups), m may be negative; those tokens are counted apart. With K = E nothing can turn
    over, and no token counts.

    Quantities:
        below [G, N] int64: tokens with 0 <= m < BOUNDS[n].
        rounding [G] int64: tokens whose two logits may change places when both are rounded to bfloat16, 0 <= m <=
            2^-8 max(|l_chosen|, |l_other|).
        negative [G] int64: tokens that were decided by more than logits.
        tokens [G] int64.
        below_share, rounding_share, negative_share fp64: divided by tokens.
    """

    name = "margin"
    reductions = {"below": "sum", "rounding": "sum", "negative": "sum", "tokens": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        def zeros(*more: int) -> Tensor:
            return torch.zeros(shape.num_tasks, *more, dtype=torch.int64, device=device)

        return {"below": zeros(len(BOUNDS)), "rounding": zeros(), "negative": zeros(), "tokens": zeros()}

    def update(self, state: State, batch: RoutedBatch) -> None:
        logits_TE, chosen_TK = batch.router_logits_TE.float(), batch.topk_index_TK.long()
        least_T = logits_TE.gather(1, chosen_TK).amin(1) if len(logits_TE) else logits_TE.sum(1)
        other_T = logits_TE.scatter(1, chosen_TK, -torch.inf).amax(1)
        margin_T = least_T - other_T
        decided_T = (margin_T >= 0) & other_T.isfinite()
        bounds_N = torch.tensor(BOUNDS, device=margin_T.device)
        size_T = torch.maximum(least_T.abs(), other_T.abs())
        batch.add_by_task(state["below"], decided_T[:, None] & (margin_T[:, None] < bounds_N))
        batch.add_by_task(state["rounding"], decided_T & (margin_T <= _BF16_STEP * size_T))
        batch.add_by_task(state["negative"], margin_T < 0)
        batch.add_by_task(state["tokens"], torch.ones_like(batch.task_T))

    def finalize(self, state: State) -> State:
        tokens_G = state["tokens"]
        return {
            **state,
            "below_share": ratio(state["below"], tokens_G[:, None]),
            "rounding_share": ratio(state["rounding"], tokens_G),
            "negative_share": ratio(state["negative"], tokens_G),
        }


STATISTIC = Margin()
