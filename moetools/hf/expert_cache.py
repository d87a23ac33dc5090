"""Decoded weights that were used last, up to a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ExpertCache:
    """Tensors by key; those that were not asked for longest are dropped first.

    Attributes:
        most_bytes: what all tensors together may take; 0 keeps none.
        hits, misses: how often `take` found something, and did not.
    """

    most_bytes: int
    hits: int = 0
    misses: int = 0
    nbytes: int = 0
    _kept: OrderedDict[Hashable, Tensor] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def take(self, key: Hashable, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """The tensor of that key, if it is there, on that device and of that dtype."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None and (found.device, found.dtype) == (device, dtype):
                self._kept.move_to_end(key)
                self.hits += 1
                return found
            self.misses += 1
            return None

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep a tensor, and drop as many others as it takes; one that alone is too large is not kept."""
        with self._lock:
            self._drop(key)
            if value.nbytes > self.most_bytes:
                return
            while self.nbytes + value.nbytes > self.most_bytes:
                self._drop(next(iter(self._kept)))
            self._kept[key] = value
            self.nbytes += value.nbytes

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._kept.clear()
            self.nbytes = 0

    def _drop(self, key: Hashable) -> None:
        dropped = self._kept.pop(key, None)
        self.nbytes -= 0 if dropped is None else dropped.nbytes
