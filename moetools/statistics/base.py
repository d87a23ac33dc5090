"""The contract of a statistic: a small mergeable accumulator over `RoutedBatch`es of one layer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Reads = Literal["output", "intermediate", "previous", "shared", "word"]
Scoring = Literal["softmax", "sigmoid"]
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes a statistic needs to lay out its accumulators (letters: `moetools.shapes`).

    Attributes:
        num_experts, top_k, hidden_size, expert_size: E, K, D, F of the layer.
        num_tasks: G, named data sets in the stream; 1 when the data has no tasks.
        scoring: how the router turns logits into scores, for statistics that speak of probabilities.
        num_sequences: in the stream, for statistics that tell them apart.
        num_words: token ids that are told apart, and one more for all others (`RoutedBatch.word_T`).
    """

    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    num_tasks: int
    scoring: Scoring = "softmax"
    num_sequences: int = 1
    num_words: int = 1


@dataclass(frozen=True, kw_only=True)
class RoutedSlots:
    """The (token, expert) pairs the router chose, sorted by expert: S = T * K rows.

    Attributes:
        token_S: row of the token in the batch's `[T, ...]` tensors.
        expert_S: expert of the slot, ascending.
        weight_S: routing weight g_e(x) the model used, fp32.
        counts_E: slots per expert (int64); `expert_S` is `repeat_interleave(arange(E), counts_E)`.
        intermediate_SF: act(gate) * up, the down projection's input; only when a statistic reads "intermediate".
        output_SD: the expert's ungated output f_e(x); only when a statistic reads "output".
    """

    token_S: Int[Tensor, "S"]
    expert_S: Int[Tensor, "S"]
    weight_S: Float[Tensor, "S"]
    counts_E: Int[Tensor, "E"]
    intermediate_SF: Float[Tensor, "S F"] | None = None
    output_SD: Float[Tensor, "S D"] | None = None

    @cached_property
    def output_norm_S(self) -> Float[Tensor, "S"]:
        """||f_e(x)||_2 of every slot, fp32; computed once per batch for all statistics that read "output"."""
        assert self.output_SD is not None, "output_norm_S needs a statistic that reads 'output'"
        return torch.linalg.vector_norm(self.output_SD, dim=1, dtype=torch.float32)

    def sum_by_expert(self, value_SD: Float[Tensor, "S D"]) -> Float[Tensor, "E D"]:
        """Sum of the rows of every expert, fp32; zeros for an expert without slots. Needs no host sync."""
        # Measured against segment_reduce, one-hot products and a sum per slice: only this is quick at every size.
        sums_ED = torch.zeros(len(self.counts_E), value_SD.shape[1], device=value_SD.device)
        return sums_ED.index_add_(0, self.expert_S, value_SD.float())


@dataclass(frozen=True, kw_only=True)
class RoutedBatch:
    """What one MoE block saw and did for T tokens; padding tokens are already removed.

    Attributes:
        hidden_TD: input of the MoE block (after its norm).
        router_logits_TE: what the router computed, fp32, before any softmax or sigmoid.
        topk_index_TK, topk_weight_TK: the experts and weights the model really used (weights fp32).
        task_T: index of the task each token belongs to, 0 <= task < num_tasks.
        slots: the same choice slot by slot, with expert activations if asked for.
        sequence_T: number of the sequence each token belongs to, in the order of the data; None where nobody counts.
        previous_TK: what the MoE layer before this one chose for the same tokens; None in the first such layer, and
            where no statistic reads "previous".
        position_T: place of the token in its sequence, from 0; None where nobody counts.
        word_T: rank of the token's id among the most frequent ids of the data, 0 <= rank < num_words - 1, or
            num_words - 1 for all other ids; None where no statistic reads "word".
        routed_TD, shared_TD: the block's output, in what the routed and what the shared experts add (gates and factors
            included); None where the block has no shared experts, or no statistic reads "shared".
    """

    hidden_TD: Float[Tensor, "T D"]
    router_logits_TE: Float[Tensor, "T E"]
    topk_index_TK: Int[Tensor, "T K"]
    topk_weight_TK: Float[Tensor, "T K"]
    task_T: Int[Tensor, "T"]
    slots: RoutedSlots
    sequence_T: Int[Tensor, "T"] | None = None
    previous_TK: Int[Tensor, "T K"] | None = None
    position_T: Int[Tensor, "T"] | None = None
    word_T: Int[Tensor, "T"] | None = None
    routed_TD: Float[Tensor, "T D"] | None = None
    shared_TD: Float[Tensor, "T D"] | None = None

    @cached_property
    def cell_S(self) -> Int[Tensor, "S"]:
        """Flat index g * E + e of every slot's (task, expert) cell in a contiguous [G, E] table."""
        return self.task_T[self.slots.token_S] * len(self.slots.counts_E) + self.slots.expert_S

    @cached_property
    def slot_TK(self) -> Int[Tensor, "T K"]:
        """The token's K rows among the slots, ordered by expert: `slots.expert_S[slot_TK]` ascends along K."""
        return self.slots.token_S.argsort(stable=True).view(self.topk_index_TK.shape)

    def outputs_by_token(self) -> Iterator[tuple[slice, Int[Tensor, "N K"], Float[Tensor, "N K D"]]]:
        """Runs of N tokens: their rows, their `slot_TK`, and the outputs f_e(x) of those slots in fp32.

        A run holds at most about 16 MB of outputs, so regrouping the slots by token never copies them all.
        """
        output_SD = self.slots.output_SD
        assert output_SD is not None, "outputs_by_token needs a statistic that reads 'output'"
        tokens, top_k = self.topk_index_TK.shape
        # Measured on CPU: runs of this size stay near the cache and are quicker than whole batches.
        step = max(1, 2**22 // max(1, top_k * output_SD.shape[1]))
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            slot_NK = self.slot_TK[rows]
            yield rows, slot_NK, output_SD[slot_NK].float()

    def add_by_task_and_expert(self, total_GE: Shaped[Tensor, "G E"], value_S: Shaped[Tensor, "S"]) -> None:
        """Add every slot's value to its (task, expert) cell of `total_GE`, in place and in its dtype."""
        total_GE.view(-1).index_add_(0, self.cell_S, value_S.to(total_GE.dtype))

    def add_by_task(self, total_G: Shaped[Tensor, "G *rest"], value_T: Shaped[Tensor, "T *rest"]) -> None:
        """Add every token's value to its task's entry of `total_G`, in place and in its dtype."""
        total_G.index_add_(0, self.task_T, value_T.to(total_G.dtype))


def ratio(numerator: Shaped[Tensor, "..."], denominator: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """numerator / denominator in fp64, broadcast; 0 where the denominator is 0 (nothing was seen)."""
    seen = denominator > 0
    return torch.where(seen, numerator.double() / torch.where(seen, denominator, 1), 0.0)


class Statistic(ABC):
    """One measured quantity of a MoE layer.

    A subclass names its accumulators in `reductions`; `init` makes them, `update` adds a batch in place. Because every
    accumulator reduces by sum or max, states merge across batches, processes and resumed runs. Sums over tokens are
    held in fp64 or int64.

    Attributes:
        name: the file name, as used in a method's `needs` and in saved files.
        reads: what the forward core must record for this statistic beside the routing of the layer itself.
        reductions: accumulator name -> how two of them merge.
        whole_sequences: all tokens of a sequence must come in one batch, because they are compared with each other.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[Reads]] = frozenset()
    reductions: ClassVar[Mapping[str, Literal["sum", "max"]]]
    whole_sequences: ClassVar[bool] = False

    @abstractmethod
    def init(self, shape: LayerShape, device: torch.device) -> State:
        """Accumulators of an empty stream."""

    @abstractmethod
    def update(self, state: State, batch: RoutedBatch) -> None:
        """Add one batch to `state`, in place."""

    def finalize(self, state: State) -> State:
        """The quantities methods and reports read, from the accumulators; by default the accumulators themselves.

        Returns a new mapping and leaves `state` as it is. Quantities over no tokens are 0.
        """
        return dict(state)

    def merge(self, left: State, right: State) -> State:
        """State of the two streams together; exact up to fp64 rounding and independent of order."""
        return {
            key: left[key] + right[key] if how == "sum" else torch.maximum(left[key], right[key])
            for key, how in self.reductions.items()
        }
