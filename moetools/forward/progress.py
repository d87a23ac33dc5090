"""How a long run tells what it is doing; the command line draws it, the library is silent."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from moetools.forward.memory import module_bytes

if TYPE_CHECKING:
    from moetools.forward.streaming import StreamedModel


class Progress(Protocol):
    """Receives the course of a pass over layers and tokens."""

    def start(self, task: str, *, layers: int, tokens: int, weights: Sequence[float] | None = None) -> None:
        """A pass begins: `tokens` real tokens through each of `layers` layers.

        Args:
            weights: size of each layer: those of about one size take about as long. None: all are alike.
        """

    def layer(self, index: int) -> None:
        """Layer `index` begins."""

    def phase(self, name: str) -> None:
        """What the current layer does now: calibrating, solving, writing."""

    def advance(self, tokens: int) -> None:
        """`tokens` more went through the current layer."""

    def stop(self) -> None:
        """The pass is over, also when it failed."""


class Silent:
    """Shows nothing."""

    def start(self, task: str, *, layers: int, tokens: int, weights: Sequence[float] | None = None) -> None: ...

    def layer(self, index: int) -> None: ...

    def phase(self, name: str) -> None: ...

    def advance(self, tokens: int) -> None: ...

    def stop(self) -> None: ...


class PhaseClock:
    """Hands everything on, and adds up the time of the phases of all layers of all passes.

    Attributes:
        seconds: by phase.
    """

    def __init__(self, shown: Progress) -> None:
        self.shown = shown
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._phase, self._since = "", 0.0

    def start(self, task: str, *, layers: int, tokens: int, weights: Sequence[float] | None = None) -> None:
        self.shown.start(task, layers=layers, tokens=tokens, weights=weights)

    def layer(self, index: int) -> None:
        self._change("")
        self.shown.layer(index)

    def phase(self, name: str) -> None:
        self._change(name)
        self.shown.phase(name)

    def advance(self, tokens: int) -> None:
        self.shown.advance(tokens)

    def stop(self) -> None:
        self._change("")
        self.shown.stop()

    def _change(self, name: str) -> None:
        now = time.monotonic()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = name, now


@contextmanager
def announced(model: "StreamedModel", task: str, tokens: int = 0) -> Iterator[Progress]:
    """A pass over the layers of a model, announced at its begin and its end.

    The bytes of its layers tell dense ones from MoE layers, which take another time.
    """
    progress = model.progress
    weights = [float(module_bytes(model.stock.layer(index), model.dtype)) for index in range(model.num_layers)]
    progress.start(task, layers=model.num_layers, tokens=tokens, weights=weights)
    try:
        yield progress
    finally:
        progress.stop()
