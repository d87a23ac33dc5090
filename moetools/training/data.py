"""Sequences for training and those held out, and how they become padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moetools.errors import DataError
from moetools.text.tokens import TokenData, pad_right

IGNORED = -100
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 32


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """All sequences without padding, and which of them train.

    Attributes:
        ids: one tensor per sequence.
        training, held_out: their numbers; held-out ones are drawn evenly from all tasks.
    """

    ids: list[Tensor]
    training: list[int]
    held_out: list[int]


def split_sequences(data: TokenData, *, seed: int) -> Sequences:
    """A tenth of the sequences (32 at most) held out, in seeded random order.

    Raises:
        DataError: fewer than two sequences that predict anything.
    """
    ids: list[Tensor] = []
    for batch in data.batches:
        masks = [None] * len(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        ids += [one if mask is None else one[mask] for one, mask in zip(batch.input_ids, masks, strict=True)]
    usable = [number for number, one in enumerate(ids) if len(one) > 1]
    if len(usable) < 2:
        raise DataError(f"training needs at least 2 sequences of 2 tokens, {len(usable)} given", hint="use more text")
    generator = torch.Generator().manual_seed(seed)
    order = [usable[place] for place in torch.randperm(len(usable), generator=generator).tolist()]
    held_out = max(1, min(_HELD_OUT_MOST, round(_HELD_OUT_SHARE * len(order))))
    return Sequences(ids=ids, training=sorted(order[held_out:]), held_out=sorted(order[:held_out]))


class SequenceDataset(Dataset[dict[str, Any]]):
    """Items of transformers' Trainer: a sequence and its number among all sequences."""

    def __init__(self, sequences: Sequences, numbers: Sequence[int]) -> None:
        self._ids, self._numbers = sequences.ids, list(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = self._numbers[place]
        return {"ids": self._ids[number], "number": number}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded ids and mask [B, N], the next token at each position as label, and the sequences' numbers."""
    ids_BN, mask_BN = pad_right([item["ids"] for item in items], 0)
    if mask_BN is None:
        mask_BN = torch.ones_like(ids_BN, dtype=torch.bool)
    next_BN = torch.where(mask_BN[:, 1:], ids_BN[:, 1:], IGNORED)
    label_BN = torch.cat((next_BN, torch.full_like(next_BN[:, :1], IGNORED)), 1)
    return {
        "input_ids": ids_BN,
        "attention_mask": mask_BN,
        "shift_labels": label_BN,
        "labels": label_BN,
        "number": torch.tensor([item["number"] for item in items]),
    }
