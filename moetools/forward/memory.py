"""Where a run's bytes go: what stays resident, what is streamed, and whether a memory budget can be kept at all."""

import ctypes
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from moetools.errors import UserError
from moetools.sizes import format_bytes

_FREE_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a streamed pass keeps in memory, in bytes.

    Attributes:
        budget: the bound.
        rest: embeddings, head and final norm; always resident.
        layer: the largest decoder layer, in disk dtype and compute dtype together.
        layers: all decoder layers in the compute dtype.
        activations: hidden states of all calibration tokens between two layers.
        workspace: what one batch needs while it runs (an estimate).
    """

    budget: int
    rest: int
    layer: int
    layers: int
    activations: int
    workspace: int

    @property
    def resident(self) -> bool:
        """Whether all layers stay in memory."""
        return self.rest + self.layers + self.layer + self.activations + self.workspace <= self.budget

    @property
    def prefetch(self) -> bool:
        """Whether the next layer can be loaded while the current one computes."""
        return self.rest + 2 * self.layer + self.workspace <= self.budget

    @property
    def activation_budget(self) -> int:
        """What is left for activations; they spill to disk beyond it."""
        weights = self.layers + self.layer if self.resident else (2 if self.prefetch else 1) * self.layer
        return max(self.budget - self.rest - weights - self.workspace, 0)

    @property
    def peak(self) -> int:
        """Expected peak of weights and activations."""
        weights = self.layers + self.layer if self.resident else (2 if self.prefetch else 1) * self.layer
        return self.rest + weights + self.workspace + min(self.activations, self.activation_budget)

    def check(self) -> None:
        """Refuse a budget below the least a streamed pass needs.

        Raises:
            UserError: with both numbers.
        """
        least = self.rest + self.layer + self.workspace
        if least > self.budget:
            raise UserError(
                f"memory budget {format_bytes(self.budget)} is too small: one decoder layer, the embeddings and one "
                f"batch need {format_bytes(least)}",
                hint="raise --memory-budget or lower --batch-size",
            )


def module_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module's parameters in `dtype`."""
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def give_back_memory() -> None:
    """Return freed memory to the operating system.

    glibc keeps the freed pieces of a layer in the heaps of the threads that read them, and a run would grow with every
    layer. Other C libraries have no such call and no such heaps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def default_budget(device: torch.device) -> int:
    """Four fifths of the memory that is free now, on the device that computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
    return int(psutil.virtual_memory().available * _FREE_SHARE)
