"""Read back the units that an interrupted run had finished, so that they are replayed and never made again."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from moetools.checkpoint.writer import CheckpointWriter
from moetools.formats.reader import packed_view
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel


def unit_name(index: int | None) -> str:
    """Name of a unit in the journal."""
    return "rest" if index is None else f"layer-{index:05d}"


class FinishedUnits(Mapping[int | None, Mapping[str, Tensor]]):
    """Index of a finished unit (None: what is outside the layers) -> its tensors as a loader sees them, read each time.

    A layer counts as finished only if all layers in front of it are: behind a damaged one, which is made again, the
    others were made for hidden states that may come out otherwise.
    """

    def __init__(
        self, writer: CheckpointWriter, config: Mapping[str, Any], num_layers: int, forward: ForwardOptions
    ) -> None:
        self._writer = writer
        done = [unit_name(index) in writer.finished for index in range(num_layers)]
        prefix = done.index(False) if False in done else num_layers
        writer.forget(unit_name(index) for index in range(prefix, num_layers))
        self._indices = [*([None] if unit_name(None) in writer.finished else []), *range(prefix)]
        self._model: StreamedModel | None = None
        if self._indices:
            staged = writer.staged(dict(config))
            view = packed_view(staged) if config.get("quantization_config") else staged
            self._model = StreamedModel(view, forward)

    def __contains__(self, index: object) -> bool:
        return index in self._indices

    def __iter__(self) -> Iterator[int | None]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int | None) -> Mapping[str, Tensor]:
        if index not in self or self._model is None:
            raise KeyError(index)
        stock = self._model.stock
        if index is None:
            return self._model.checkpoint.read([*stock.names[None], *stock.extra_names])
        return stock.read_layer(index)

    def facts(self, index: int | None) -> Mapping[str, Any]:
        """The facts that were stored with a finished unit."""
        return self._writer.payload(unit_name(index))["facts"]


class NoUnits(FinishedUnits):
    """Those of a run that begins."""

    def __init__(self) -> None:
        self._indices, self._model = [], None
