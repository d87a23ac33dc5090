"""Small MoE blocks whose every expert is also evaluated densely, so that statistics can be checked against masks."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moetools.statistics.base import LayerShape, RoutedBatch, RoutedSlots


@dataclass(frozen=True, kw_only=True)
class Case:
    """A routed batch next to its dense twin: all experts on all tokens, and which of them were chosen."""

    shape: LayerShape
    hidden_TD: Tensor
    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    task_T: Tensor
    experts_EDD: Tensor
    previous_TK: Tensor
    routed_TD: Tensor
    shared_TD: Tensor
    word_T: Tensor

    @property
    def chosen_TE(self) -> Tensor:
        return torch.stack([(self.index_TK == e).any(1) for e in range(self.shape.num_experts)], 1)

    @property
    def gate_TE(self) -> Tensor:
        columns = [(self.weight_TK * (self.index_TK == e)).sum(1) for e in range(self.shape.num_experts)]
        return torch.stack(columns, 1).double()

    @property
    def output_TED(self) -> Tensor:
        return torch.einsum("td,edf->tef", self.hidden_TD, self.experts_EDD).double()

    def of_task(self, task: int) -> Tensor:
        return self.task_T == task

    def batch(self, rows: slice = slice(None), order: Tensor | None = None) -> RoutedBatch:
        """The routed batch of some tokens, as the forward core would build it."""
        chosen = torch.arange(len(self.task_T))[rows] if order is None else order[rows]
        index_TK, hidden_TD = self.index_TK[chosen], self.hidden_TD[chosen]
        expert_S, slot_S = index_TK.flatten().sort(stable=True)
        token_S = slot_S // self.shape.top_k
        output_SD = torch.einsum("td,edf->tef", hidden_TD, self.experts_EDD)[token_S, expert_S]
        return RoutedBatch(
            hidden_TD=hidden_TD,
            router_logits_TE=self.logits_TE[chosen],
            topk_index_TK=index_TK,
            topk_weight_TK=self.weight_TK[chosen],
            task_T=self.task_T[chosen],
            sequence_T=self.task_T[chosen],
            previous_TK=self.previous_TK[chosen],
            position_T=chosen,
            word_T=self.word_T[chosen],
            routed_TD=self.routed_TD[chosen],
            shared_TD=self.shared_TD[chosen],
            slots=RoutedSlots(
                token_S=token_S,
                expert_S=expert_S,
                weight_S=self.weight_TK[chosen].flatten()[slot_S],
                counts_E=torch.bincount(expert_S, minlength=self.shape.num_experts),
                intermediate_SF=torch.zeros(len(token_S), self.shape.expert_size),
                output_SD=output_SD,
            ),
        )


@pytest.fixture
def make_case():
    def make(tokens=50, experts=6, top_k=2, tasks=3, unused=(), scoring="softmax", seed=0) -> Case:
        generator = torch.Generator().manual_seed(seed)
        hidden_TD = torch.randn(tokens, 5, generator=generator)
        logits_TE = torch.randn(tokens, experts, generator=generator) * 2
        logits_TE[:, list(unused)] = -50.0
        weight_TK, index_TK = logits_TE.softmax(1).topk(top_k, dim=1)
        shape = LayerShape(
            num_experts=experts,
            top_k=top_k,
            hidden_size=5,
            expert_size=3,
            num_tasks=tasks,
            scoring=scoring,
            num_sequences=tasks,
            num_words=4,
        )
        return Case(
            shape=shape,
            hidden_TD=hidden_TD,
            logits_TE=logits_TE,
            index_TK=index_TK,
            weight_TK=weight_TK,
            task_T=torch.randint(tasks, (tokens,), generator=generator),
            experts_EDD=torch.randn(experts, 5, 5, generator=generator),
            previous_TK=torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices.int(),
            routed_TD=torch.randn(tokens, 5, generator=generator),
            shared_TD=torch.randn(tokens, 5, generator=generator),
            word_T=torch.randint(4, (tokens,), generator=generator),
        )

    return make
