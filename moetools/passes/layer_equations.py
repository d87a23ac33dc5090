"""What an expert computes inside, and which tokens of a batch are held out."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moetools.architectures.weights import WideExpert
from moetools.text.tokens import TokenBatch

HELD_OUT_EVERY = 7

Activate = Callable[[Tensor | None, Tensor], Tensor]
"""(gate or None, up) pre-activations -> intermediate."""


def intermediate(expert: WideExpert, hidden: Tensor, activate: Activate) -> Float[Tensor, "S W"]:
    hidden = hidden.float()
    up = nn.functional.linear(hidden, expert.up_WD, expert.up_bias_W)
    gate = None
    if expert.gate_WD is not None:
        gate = nn.functional.linear(hidden, expert.gate_WD, expert.gate_bias_W)
    return activate(gate, up)


def family_activation(experts: Any) -> Activate:
    """The family's own activation, on canonical gate and up pre-activations."""

    def activate(gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return experts.act_fn(up)
        interleaved = not getattr(experts, "is_concatenated", True)
        fused = torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)
        return experts._apply_gate(fused)

    return activate


def chosen_rows(batch: TokenBatch, first: int, held: bool) -> Tensor:
    """Flat mask of the real tokens of the batch's sequences that are (not) held out: every seventh of the data is.

    Args:
        first: number of the batch's first sequence in the data.
    """
    size, length = batch.input_ids.shape
    sequence = torch.arange(size, device=batch.input_ids.device) + first
    chosen = (sequence % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held
    mask = chosen[:, None].expand(size, length)
    if batch.attention_mask is not None:
        mask = mask & batch.attention_mask
    return mask.reshape(-1)


def first_sequences(batches: Sequence[TokenBatch]) -> list[int]:
    """Number of each batch's first sequence in the data."""
    return list(itertools.accumulate((len(batch.input_ids) for batch in batches[:-1]), initial=0))
