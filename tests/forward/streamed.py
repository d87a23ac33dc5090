"""Whole passes over a streamed model, as the verbs make them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch, TokenData


def open_model(path: Path, **options: Any) -> StreamedModel:
    return StreamedModel(open_checkpoint(path), ForwardOptions(**{"device": "cpu"} | options))


def token_batch(rows: int, length: int, *, padding: Sequence[int] = (), seed: int = 0, task: int = 0) -> TokenBatch:
    """Random ids; `padding` counts the padded positions of each row."""
    ids = torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = None
    if padding:
        mask = torch.arange(length) < length - torch.tensor(padding)[:, None]
        ids = torch.where(mask, ids, 1)
    return TokenBatch(input_ids=ids, attention_mask=mask, task=torch.full((rows,), task))


def mixed_batches() -> list[TokenBatch]:
    """Different lengths and widths, with and without padding; two of one shape to share what is cached."""
    return [
        token_batch(3, 20, seed=1),
        token_batch(2, 20, padding=(0, 7), seed=2),
        token_batch(4, 9, padding=(1, 2, 3, 6), seed=3, task=1),
        token_batch(3, 20, seed=4, task=1),
        token_batch(1, 33, seed=5, task=1),
    ]


def token_data(batches: Sequence[TokenBatch], tasks: tuple[str, ...] = ("first", "second")) -> TokenData:
    return TokenData(tasks=tasks, batches=tuple(batches), fingerprint="of these batches", seq_len=64)


def streamed_logits(
    model: StreamedModel, batches: Sequence[TokenBatch], *, spill: bool = False, **loading: bool
) -> list[Tensor]:
    plan = model.memory_plan(batches)
    with torch.inference_mode():
        activations = model.activations(batches, plan)
        if spill:
            activations = type(activations)(
                batches, width=model.hidden_size, dtype=model.dtype, device=model.device, budget=0
            )
            assert activations.spilled
        model.embed(batches, activations)
        for layer in model.layers(**loading):
            for number, batch in enumerate(batches):
                activations[number] = model.run_layer(layer, model.on_device(batch), activations[number])
        return [
            model.skeleton.logits(model.on_device(batch), activations[number].to(model.device)).cpu()
            for number, batch in enumerate(batches)
        ]


def stock_logits_of(model: Any, batch: TokenBatch) -> Tensor:
    mask = None if batch.attention_mask is None else batch.attention_mask.long()
    with torch.inference_mode():
        return model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits


def real(batch: TokenBatch, tensor: Tensor) -> Tensor:
    """The rows [T, ...] of a [B, N, ...] tensor that belong to real tokens."""
    return tensor.flatten(0, 1) if batch.attention_mask is None else tensor[batch.attention_mask]
