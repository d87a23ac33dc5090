"""Wall time and peak memory of the stages of a run."""

import contextlib
import time
from collections.abc import Iterator

import torch

from moetools.forward.memory import peak_memory


class Stages:
    """Measures what happens inside `with stages("name"):`.

    Attributes:
        seconds: of every stage so far, in order.
        peak_memory: most bytes in use while it ran.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        with peak_memory(self._device) as seen:
            yield
        self.seconds[name] = round(time.monotonic() - start, 3)
        self.peak_memory[name] = max(seen)
