"""Hidden states of all calibration batches between two layers: in memory while they fit, else in a file."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moetools.errors import UserError
from moetools.sizes import format_bytes
from moetools.text.tokens import TokenBatch


class Activations:
    """One [B, N, D] tensor per batch, replaced layer after layer.

    Args:
        batches: their shapes fix the sizes.
        width: D.
        dtype: the compute dtype.
        device: where they are kept while they fit.
        budget: bytes they may take in memory; beyond it they live in an unnamed file in the temporary directory
            (`TMPDIR`), which the operating system removes with the process.
    """

    def __init__(
        self, batches: Sequence[TokenBatch], *, width: int, dtype: torch.dtype, device: torch.device, budget: int
    ) -> None:
        self._shapes = [(*batch.input_ids.shape, width) for batch in batches]
        self.nbytes = activation_bytes(batches, width, dtype)
        self.spilled = self.nbytes > budget
        self._kept: list[Tensor | None] = [None] * len(batches)
        self._device = device
        if self.spilled:
            self._kept = list(_in_file(self._shapes, dtype))

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        assert kept is not None, "a batch is set before it is read"
        return kept

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        kept = self._kept[index]
        if self.spilled and kept is not None:
            kept.copy_(hidden)
        else:
            self._kept[index] = hidden.to(self._device)


def activation_bytes(batches: Sequence[TokenBatch], width: int, dtype: torch.dtype) -> int:
    """Bytes of one [B, N, D] tensor per batch."""
    return sum(batch.input_ids.numel() for batch in batches) * width * dtype.itemsize


def _in_file(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    counts = [int(torch.Size(shape).numel()) for shape in shapes]
    with tempfile.TemporaryDirectory(prefix="moetools-") as folder:
        file = Path(folder) / "activations"
        # The mapping keeps the data alive after the directory, and with it the name, is gone.
        _reserve(file, sum(counts) * dtype.itemsize)
        storage = torch.from_file(str(file), shared=True, size=sum(counts), dtype=dtype)
    return [part.view(shape) for part, shape in zip(storage.split(counts), shapes, strict=True)]


def _reserve(file: Path, nbytes: int) -> None:
    """Take the disk space now: a full disk under a mapped file would kill the process without a word.

    Raises:
        UserError: there is not enough of it.
    """
    try:
        with file.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, nbytes)
    except OSError as error:
        raise UserError(
            f"no room for {format_bytes(nbytes)} of activations in {file.parent.parent}: {error.strerror}",
            hint="set TMPDIR to a larger disk, raise `memory_budget`, or use fewer samples",
        ) from error
