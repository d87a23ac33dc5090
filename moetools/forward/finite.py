"""The one guard against weights that are no numbers to compute with, and hidden states that are NaN or infinite."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError
from moetools.text.tokens import TokenBatch


def refuse_weights(checkpoint: Checkpoint, names: Sequence[str], tensors: Iterable[Tensor]) -> None:
    """Refuse weights that are NaN or infinite, by their name on disk.

    Single numbers may be infinite: bounds of a clipped layer.

    Args:
        names: on disk, of what `tensors` hold.

    Raises:
        CheckpointError: naming the tensor.
    """
    if _all(_are_finite(tensors)):
        return
    for name in names:
        if not _all(_are_finite(checkpoint.read([name]).values())):
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{name}' has values that are NaN or infinite",
                hint="the checkpoint is damaged, or was saved in a dtype too narrow for it",
            )


def refuse_integers(checkpoint: Checkpoint, floats: Collection[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse integers in the place of floating point weights: the codes of packed weights whose scales are missing.

    Args:
        floats: names in the model of what must be floating point.
        tensors: what was read, by name in the model.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if name in floats and not tensor.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.path}: weight '{name}' is stored as {str(tensor.dtype).removeprefix('torch.')}, and this "
                "model computes with floating point weights",
                hint="packed weights need their scales, and a `quantization_config` in config.json",
            )


class HiddenGuard:
    """Notices hidden states that are NaN or infinite behind the layer that made them so.

    On a GPU, the answer for one layer is asked for when the next one runs, so that nothing waits for it.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._layer = -1
        self._answers: list[Tensor] = []

    def see(self, layer: int, hidden: Tensor, batch: TokenBatch) -> None:
        """Check what comes out of `layer`; positions without a token may hold anything.

        Raises:
            CheckpointError: naming a layer that was seen before.
        """
        if layer != self._layer:
            self.settle()
        if batch.attention_mask is not None:
            hidden = hidden.masked_fill(~batch.attention_mask[..., None].to(hidden.device), 0)
        self._layer = layer
        self._answers += _are_finite([hidden])
        if not hidden.is_cuda:
            self.settle()

    def settle(self) -> None:
        """Judge what was seen since the last time.

        Raises:
            CheckpointError: naming the layer.
        """
        answers, self._answers = self._answers, []
        if not _all(answers):
            wide = self._dtype in (torch.float32, torch.float64)
            raise CheckpointError(
                f"{self._checkpoint.path}: layer {self._layer} computes values that are NaN or infinite in "
                f"{str(self._dtype).removeprefix('torch.')}, from weights that are not",
                hint="the checkpoint is damaged" if wide else "the dtype is too narrow for this model: `dtype=float32`",
            )


def _are_finite(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of each tensor of floating point numbers, whether smallest and largest value are finite; still on its device.

    Both are NaN where any value is. They take one reading of the tensor, an eighth of the time that casting it takes.
    """
    judged = [
        tensor.float() if tensor.itemsize == 1 else tensor  # torch compares no 8-bit floats
        for tensor in tensors
        if tensor.is_floating_point() and tensor.dim() and tensor.numel()
    ]
    return [torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in judged]


def _all(answers: Sequence[Tensor]) -> bool:
    return not answers or bool(torch.stack(list(answers)).all())
