"""Where a run's bytes go: what stays resident, what is streamed, and whether a memory budget can be kept at all."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import psutil
import torch
from torch import nn

from moetools.architectures.base import Architecture
from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import UserError
from moetools.sizes import format_bytes

_FREE_SHARE = 0.8
_SAMPLE_SECONDS = 0.02
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
_LARGE = 2**21


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where the bytes of a run go; the layers are streamed, the hidden states spill to disk, solvers take turns.

    Attributes:
        budget: the bound.
        rest: embeddings, head and final norm of every model of the run; always resident.
        layer: the largest decoder layer, in disk dtype and compute dtype together.
        layers: all decoder layers in the compute dtype.
        activations: hidden states of all calibration tokens between two layers, one room of them.
        rooms: how many of those are kept at a time.
        workspace: what one batch needs while it runs (an estimate).
        scratch: what statistics and solvers need at least beside all that; they get more where there is more.
    """

    budget: int
    rest: int
    layer: int
    layers: int
    activations: int
    workspace: int
    rooms: int = 1
    scratch: int = 0

    @property
    def _fixed(self) -> int:
        return self.rest + self.workspace + self.scratch

    @property
    def resident(self) -> bool:
        """Whether all layers stay in memory."""
        return self._fixed + self.layers + self.layer + self.rooms * self.activations <= self.budget

    @property
    def prefetch(self) -> bool:
        """Whether the next layer can be loaded while the current one computes."""
        return self._fixed + 2 * self.layer <= self.budget

    @property
    def _weights(self) -> int:
        return self.layers + self.layer if self.resident else (2 if self.prefetch else 1) * self.layer

    @property
    def activation_budget(self) -> int:
        """What is left for each room; it spills to disk beyond it."""
        return max(self.budget - self._fixed - self._weights, 0) // self.rooms

    @property
    def scratch_budget(self) -> int:
        """What statistics and solvers may take: all that nothing else needs, at least `scratch`."""
        rooms = self.rooms * min(self.activations, self.activation_budget)
        return max(self.budget - self.rest - self.workspace - self._weights - rooms, self.scratch)

    @property
    def spare(self) -> int:
        """What statistics and solvers may take beside the least they need."""
        return self.scratch_budget - self.scratch

    def covering(self, other: "MemoryPlan") -> "MemoryPlan":
        """For a run that does one after the other: enough of everything for both."""
        names = [field.name for field in fields(self) if field.name != "budget"]
        return replace(self, **{name: max(getattr(self, name), getattr(other, name)) for name in names})

    @property
    def peak(self) -> int:
        """Expected peak of weights, hidden states and the least that solvers need."""
        return self._fixed + self._weights + self.rooms * min(self.activations, self.activation_budget)

    def check(self) -> None:
        """Refuse a budget below the least a streamed pass needs.

        Raises:
            UserError: with both numbers.
        """
        least = self._fixed + self.layer
        if least > self.budget:
            solver = f", {format_bytes(self.scratch)} for statistics and solvers" if self.scratch else ""
            raise UserError(
                f"memory budget {format_bytes(self.budget)} is too small: one decoder layer, the embeddings and one "
                f"batch need {format_bytes(least)}{solver and ' with' + solver[1:]}",
                hint="raise `memory_budget` or lower `batch_size`",
            )


def module_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module's parameters in `dtype`."""
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def widest(checkpoint: Checkpoint, arch: Architecture) -> int:
    """Bytes of the widest element of a matrix; routers, and what is no matrix, are small whatever their dtype."""
    tensors = checkpoint.tensors.items()
    dtypes = {info.dtype for name, info in tensors if len(info.shape) > 1 and arch.part_of(name) != "router"}
    return max(TORCH_DTYPES[dtype].itemsize for dtype in dtypes)


def give_back_memory() -> None:
    """Return freed memory to the operating system.

    glibc keeps the freed pieces of a layer in the heaps of the threads that read them, and a run would grow with every
    layer. Other C libraries have no such call and no such heaps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def hold_allocator() -> None:
    """Have large blocks come from the operating system and go back to it at once, so that a budget can be kept.

    glibc learns to serve blocks of up to 32 MB from its own heaps, and the pieces left in them took half as much again
    as a run needed. Blocks above `_LARGE` cost page faults instead. Other C libraries have no such call, and a user who
    has set the threshold knows better.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE)
        set_option(_M_TRIM_THRESHOLD, _LARGE)


def default_budget(device: torch.device) -> int:
    """Four fifths of the memory that is free now, on the device that computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
    return int(psutil.virtual_memory().available * _FREE_SHARE)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Bytes seen while the context is open; their maximum is the peak."""
    seen: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield seen
        seen.append(torch.cuda.max_memory_allocated(device))
        return
    process, stop = psutil.Process(), threading.Event()

    def sample() -> None:
        seen.append(process.memory_info().rss)
        while not stop.wait(_SAMPLE_SECONDS):
            seen[:] = [max(seen[0], process.memory_info().rss)]

    thread = threading.Thread(target=sample, name="moetools-memory", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
