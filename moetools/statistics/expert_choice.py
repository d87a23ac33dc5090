"""What if experts chose their tokens, and not tokens their experts?"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class ExpertChoice(Statistic):
    """Expert-choice routing beside the model's own, sequence by sequence.

    In a sequence of n tokens every expert takes the C = ceil(n K / E) tokens that score it highest, so the load is even
    by construction. A token's scores are softmax(l), or sigmoid(l) for routers that score by sigmoid.

    Quantities:
        kept [G] int64: slots (token, expert) of the model's choice that expert choice has as well.
        orphans [G] int64: tokens that no expert takes.
        slots, tokens [G] int64.
        kept_share, orphan_share [G] fp64: kept / slots, orphans / tokens.

    Source: expert-choice routing, arXiv 2202.09368, section 3.2, with a capacity factor of K.
    """

    name = "expert_choice"
    whole_sequences = True
    reductions = {"kept": "sum", "orphans": "sum", "slots": "sum", "tokens": "sum", "sigmoid": "max"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        def zeros() -> Tensor:
            return torch.zeros(shape.num_tasks, dtype=torch.int64, device=device)

        sigmoid = torch.tensor(int(shape.scoring == "sigmoid"), device=device)
        return {"kept": zeros(), "orphans": zeros(), "slots": zeros(), "tokens": zeros(), "sigmoid": sigmoid}

    def update(self, state: State, batch: RoutedBatch) -> None:
        assert batch.sequence_T is not None, "expert_choice needs to know the tokens' sequences"
        logits_TE, chosen_TK = batch.router_logits_TE.float(), batch.topk_index_TK.long()
        score_TE = torch.where(state["sigmoid"] > 0, functional.logsigmoid(logits_TE), logits_TE.log_softmax(1))
        experts, top_k = logits_TE.shape[1], chosen_TK.shape[1]
        rank_TE, length_T = _ranks(score_TE, batch.sequence_T)
        capacity_T = torch.div(length_T * top_k + experts - 1, experts, rounding_mode="floor")
        taken_TE = rank_TE < capacity_T[:, None]
        batch.add_by_task(state["kept"], taken_TE.gather(1, chosen_TK).sum(1))
        batch.add_by_task(state["orphans"], ~taken_TE.any(1))
        batch.add_by_task(state["slots"], torch.full_like(batch.task_T, top_k))
        batch.add_by_task(state["tokens"], torch.ones_like(batch.task_T))

    def finalize(self, state: State) -> State:
        return {
            **state,
            "kept_share": ratio(state["kept"], state["slots"]),
            "orphan_share": ratio(state["orphans"], state["tokens"]),
        }


def _ranks(score_TE: Float[Tensor, "T E"], sequence_T: Int[Tensor, "T"]) -> tuple[Int[Tensor, "T E"], Int[Tensor, "T"]]:
    """Place of every token among those of its sequence, by falling score of each expert; the sequences' lengths."""
    number_T, length_S = sequence_T.unique(return_inverse=True, return_counts=True)[1:]
    start_S = length_S.cumsum(0) - length_S
    by_score_TE = score_TE.argsort(dim=0, descending=True, stable=True)
    order_TE = by_score_TE.gather(0, number_T[by_score_TE].argsort(dim=0, stable=True))
    place_TE = torch.arange(len(sequence_T), device=sequence_T.device)[:, None] - start_S[number_T[order_TE]]
    return torch.empty_like(place_TE).scatter_(0, order_TE, place_TE), length_S[number_T]


STATISTIC = ExpertChoice()
