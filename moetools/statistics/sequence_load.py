"""Expert load of every sequence: what tells how far load varies without any difference between tasks."""

import torch

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic


class SequenceLoad(Statistic):
    """Slots per expert and sequence, and each sequence's task; sequences are numbered in the order of the data.

    Quantities:
        slots [S, E] int64: number of (token of sequence s, rank k) pairs whose k-th choice is expert e.
        task [S] int64: index of the task of sequence s.
    """

    name = "sequence_load"
    reductions = {"slots": "sum", "task": "max"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        return {
            "slots": torch.zeros(shape.num_sequences, shape.num_experts, dtype=torch.int64, device=device),
            "task": torch.zeros(shape.num_sequences, dtype=torch.int64, device=device),
        }

    def update(self, state: State, batch: RoutedBatch) -> None:
        assert batch.sequence_T is not None, "sequence_load needs to know the tokens' sequences"
        slots = batch.slots
        cell_S = batch.sequence_T[slots.token_S] * len(slots.counts_E) + slots.expert_S
        state["slots"].view(-1).index_add_(0, cell_S, torch.ones_like(cell_S))
        state["task"][batch.sequence_T] = batch.task_T


STATISTIC = SequenceLoad()
