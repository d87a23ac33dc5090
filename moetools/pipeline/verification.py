"""Reload a written checkpoint through stock transformers and compare it with what was meant, layer by layer."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.checkpoint.tensor_bytes import tensor_bytes
from moetools.errors import CheckpointError, VerificationError
from moetools.formats.reader import open_model
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress, announced
from moetools.forward.streaming import StreamedModel
from moetools.text.tokens import TokenBatch, TokenData

_PROBE_SEQUENCES = 2
_PROBE_TOKENS = 64
_PIECE_BYTES = 1 << 24
"""Also in `_stock_process`, which imports nothing of this package."""
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Intended:
    """What a written checkpoint is meant to hold.

    Attributes:
        digests: of every tensor: decoder layer -> by fused name inside the layer; None -> by name on disk, for those
            outside the layers.
        batch, logits: a probe batch and the logits [B, N, V] the in-memory result gives for it.
    """

    digests: Mapping[int | None, Mapping[str, str]]
    batch: TokenBatch
    logits: Float[Tensor, "B N V"]


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`digest` of each."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype and shape and of the SHA-256 of every 16 MiB of its bytes, made several at a time."""
    content = tensor_bytes(tensor)
    pieces = [content[start : start + _PIECE_BYTES] for start in range(0, len(content), _PIECE_BYTES)]
    whole = sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if len(pieces) < 2:
        found = [sha256(piece).digest() for piece in pieces]
    else:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            found = list(threads.map(lambda piece: sha256(piece).digest(), pieces))
    whole.update(b"".join(found))
    return whole.hexdigest()


def probe_batch(data: TokenData | None, vocab_size: int) -> TokenBatch:
    """A few short sequences: the first of the data, or seeded random ids without data."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab_size, (_PROBE_SEQUENCES, _PROBE_TOKENS), generator=generator)
        return TokenBatch(input_ids=ids, attention_mask=None, task=torch.zeros(_PROBE_SEQUENCES, dtype=torch.int64))
    first = data.batches[0]
    mask = first.attention_mask
    return TokenBatch(
        input_ids=first.input_ids[:_PROBE_SEQUENCES, :_PROBE_TOKENS].contiguous(),
        attention_mask=None if mask is None else mask[:_PROBE_SEQUENCES, :_PROBE_TOKENS].contiguous(),
        task=first.task[:_PROBE_SEQUENCES],
    )


def verify_checkpoint(
    path: Path, forward: ForwardOptions, intended: Intended, *, progress: Progress, prefetch: bool
) -> None:
    """Load `path` as stock transformers does and compare every tensor and the probe batch's logits, bit for bit.

    Args:
        prefetch: whether two layers fit in memory.

    Raises:
        VerificationError: naming the first tensor that differs, or by how much the logits do.
    """
    try:
        model = StreamedModel(open_model(path), forward, progress=progress)
        model.stock.check_names()
        rest = model.checkpoint.read([*model.stock.names[None], *model.stock.extra_names])
        _compare("outside the layers", tensor_digests(rest), intended.digests[None])
        logits = _run(model, intended, prefetch)
    except CheckpointError as error:
        raise VerificationError(f"the written checkpoint does not load: {error.message}", hint=HINT) from error
    if not torch.equal(logits, intended.logits):
        worst = (logits - intended.logits).abs().max().item()
        raise VerificationError(f"the written checkpoint's logits differ by up to {worst:.3g}", hint=HINT)


HINT = (
    "nothing was put in the output's place; if the disk is failing, `resume` makes again what changed on it; else "
    "please report this as a bug of moetools"
)


def _run(model: StreamedModel, intended: Intended, prefetch: bool) -> Tensor:
    with announced(model, "verifying") as progress, torch.inference_mode():
        hidden = model.skeleton.enter(intended.batch)[0]
        for layer in model.layers(keep_native=True, prefetch=prefetch):
            progress.layer(layer.index)
            assert layer.native is not None
            _compare(f"layer {layer.index}", tensor_digests(layer.native), intended.digests[layer.index])
            hidden = model.run_layer(layer, intended.batch, hidden)
        return model.skeleton.logits(intended.batch, hidden)


def _compare(where: str, found: Mapping[str, str], meant: Mapping[str, str]) -> None:
    for name in sorted(found.keys() | meant.keys()):
        if found.get(name) != meant.get(name):
            raise VerificationError(f"{where}: '{name}' does not load as it was meant", hint=HINT)
