"""Which experts serve which token ids and which positions, beside the same counts with each sequence shuffled."""

import torch
from jaxtyping import Int
from torch import Tensor

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic

BLOCKS = 8
"""Sequences are dealt out to so many blocks, which a bootstrap can draw."""
POSITIONS = 16
"""Bins of positions: 0, 1 to 2, 3 to 6, ..., from 2^15 - 1 on."""
_PRIMES = (2654435761, 40503, 2246822519)


class WordUse(Statistic):
    """Slots by (token id, expert) and (position, expert), in blocks of sequences; and what chance makes of them.

    Ids are those that `RoutedBatch.word_T` tells apart: the most frequent ones of the data, all others are one. So the
    accumulators are bounded whatever the vocabulary: 8 bytes * 8 blocks * 2 * (num_words + 16) * E. Position p is in
    bin floor(log2(p + 1)). Sequence s is in block s mod 8.

    For the null, every token keeps its experts and gets the id and position of another token of the same sequence: a
    permutation that a hash of sequence number and position gives. What is left there comes from sequences that differ
    and from finite counts.

    Quantities:
        words, words_null [8, num_words, E] int64: slots as they are, and shuffled.
        positions, positions_null [8, 16, E] int64.
    """

    name = "word_use"
    reads = frozenset({"word"})
    whole_sequences = True
    reductions = {"words": "sum", "words_null": "sum", "positions": "sum", "positions_null": "sum"}

    def init(self, shape: LayerShape, device: torch.device) -> State:
        def zeros(kinds: int) -> Tensor:
            return torch.zeros(BLOCKS, kinds, shape.num_experts, dtype=torch.int64, device=device)

        words, places = shape.num_words, POSITIONS
        sizes = {"words": words, "words_null": words, "positions": places, "positions_null": places}
        return {key: zeros(size) for key, size in sizes.items()}

    def update(self, state: State, batch: RoutedBatch) -> None:
        word_T, sequence_T, position_T = batch.word_T, batch.sequence_T, batch.position_T
        assert word_T is not None
        assert sequence_T is not None
        assert position_T is not None
        bin_T = (position_T + 1).double().log2().floor().long().clamp(max=POSITIONS - 1)
        other_T = _shuffled(sequence_T, position_T)
        slots = batch.slots
        block_T = sequence_T % BLOCKS
        kinds = {"words": word_T, "words_null": word_T[other_T], "positions": bin_T, "positions_null": bin_T[other_T]}
        for key, kind_T in kinds.items():
            row_T = block_T * state[key].shape[1] + kind_T
            cell_S = row_T[slots.token_S] * len(slots.counts_E) + slots.expert_S
            state[key].view(-1).index_add_(0, cell_S, torch.ones_like(cell_S))


def _shuffled(sequence_T: Int[Tensor, "T"], position_T: Int[Tensor, "T"]) -> Int[Tensor, "T"]:
    """Every token's partner in a permutation of each sequence; the order of the tokens here does not matter."""
    key_T = ((position_T + 1) * _PRIMES[0] + sequence_T * _PRIMES[1]) % 2**32
    key_T = ((key_T ^ (key_T >> 15)) * _PRIMES[2]) % 2**32
    key_T = key_T ^ (key_T >> 13)
    in_order_T, by_key_T = (_sorted(sequence_T, place_T) for place_T in (position_T, key_T))
    return torch.empty_like(in_order_T).scatter_(0, in_order_T, by_key_T)


def _sorted(sequence_T: Int[Tensor, "T"], place_T: Int[Tensor, "T"]) -> Int[Tensor, "T"]:
    """Rows sorted by sequence and then by place."""
    order_T = place_T.argsort(stable=True)
    return order_T[sequence_T[order_T].argsort(stable=True)]


STATISTIC = WordUse()
