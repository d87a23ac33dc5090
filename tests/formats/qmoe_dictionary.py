"""QMoE's code for ternary matrices, from its description: what the entropy coder of moetools is compared with.

Source: E. Frantar, D. Alistarh, arXiv 2310.16795, section 4 and algorithm 1. 16-bit words stand for runs of up to 14
pairs of ternary weights; the words are the most probable runs when weights are independent and zero with probability
.885. Every row is coded on its own; where rows begin is kept as 32 bits each.
"""

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

WORDS = 2**16
LONGEST = 14
ZERO_PROBABILITY = 0.885


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """child_NP: the word that continues word n by pair p, -1 if none; pair_NL, length_N: its pairs. Word 0 is empty."""

    child_NP: Tensor
    pair_NL: Tensor
    length_N: Tensor


def build(zero_probability: float = ZERO_PROBABILITY) -> Dictionary:
    """The 2^16 most probable runs; with a run all its beginnings are in, so the longest match is found greedily."""
    weight = [(1 - zero_probability) / 2, zero_probability, (1 - zero_probability) / 2]
    pairs = [weight[pair // 3] * weight[pair % 3] for pair in range(9)]
    child = torch.full((WORDS + 1, 9), -1, dtype=torch.int32)
    pair_NL, length = torch.zeros((WORDS + 1, LONGEST), dtype=torch.uint8), torch.zeros(WORDS + 1, dtype=torch.int64)
    children, runs, lengths = child.numpy(), pair_NL.numpy(), length.numpy()
    heap = [(-probability, 0, pair) for pair, probability in enumerate(pairs)]
    heapq.heapify(heap)
    for word in range(1, WORDS + 1):
        negative, parent, pair = heapq.heappop(heap)
        children[parent, pair] = word
        runs[word], lengths[word] = runs[parent], lengths[parent] + 1
        runs[word, lengths[parent]] = pair
        if lengths[word] < LONGEST:
            for more, probability in enumerate(pairs):
                heapq.heappush(heap, (negative * probability, word, more))
    return Dictionary(child_NP=child, pair_NL=pair_NL, length_N=length)


def encode(codes_OI: Tensor, dictionary: Dictionary) -> tuple[Tensor, Tensor]:
    """Words (row after row) and the number of words of each row, of codes in {-1, 0, 1}; rows side by side."""
    padded_OI = torch.nn.functional.pad(codes_OI, (0, codes_OI.shape[1] % 2)).long() + 1
    pair_OP = padded_OI[:, ::2] * 3 + padded_OI[:, 1::2]
    node_O = torch.zeros(len(pair_OP), dtype=torch.long)
    emitted = torch.full((pair_OP.shape[1] + 1, len(pair_OP)), -1, dtype=torch.int32)
    for step, pair_O in enumerate(pair_OP.T):
        next_O = dictionary.child_NP[node_O, pair_O].long()
        ends_O = next_O < 0
        emitted[step] = torch.where(ends_O, node_O.int(), -1)
        node_O = torch.where(ends_O, dictionary.child_NP[0][pair_O].long(), next_O)
    emitted[-1] = node_O.int()
    word_OS = emitted.T
    return word_OS[word_OS > 0].long(), (word_OS > 0).sum(1)


def decode(words: Tensor, columns: int, dictionary: Dictionary) -> Tensor:
    """The codes again; the pairs of all words at once, since every row ends with a word."""
    length_W = dictionary.length_N[words]
    filled_WL = torch.arange(LONGEST) < length_W[:, None]
    pair_P = dictionary.pair_NL[words][filled_WL]
    codes = torch.stack([pair_P // 3, pair_P % 3], 1).to(torch.int8) - 1
    return codes.view(-1, columns + columns % 2)[:, :columns]


def bits(words: Tensor, rows: int) -> int:
    """16 a word and 32 a row."""
    return 16 * len(words) + 32 * rows
