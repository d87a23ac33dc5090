"""The head of a language model some rows at a time, so that [tokens, vocabulary] never exists as a whole."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch

_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits computed at a time: few enough for a CPU's cache, enough to fill a GPU."""
_LEAST_ROWS = 64


def head_rows(device: torch.device, vocabulary: int) -> int:
    """Rows whose logits are computed together."""
    return max(_LEAST_ROWS, _ELEMENTS.get(device.type, 1 << 20) // vocabulary)


def row_logits(
    model: StreamedModel, token_R: Int[Tensor, "R"], hidden_RD: Float[Tensor, "R D"]
) -> Float[Tensor, "R V"]:
    """Logits behind the hidden states of single positions.

    Behind the last layer no position sees another: each row may pose as a sequence of its own.
    """
    alone = TokenBatch(input_ids=token_R[:, None], attention_mask=None, task=torch.zeros_like(token_R))
    return model.skeleton.logits(alone, hidden_RD[:, None])[:, 0]
