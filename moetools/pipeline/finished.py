"""Read back the units that an interrupted run had finished, so that they are replayed and never made again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moetools.checkpoint.writer import CheckpointWriter
from moetools.formats.reader import packed_view
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel


def unit_name(index: int | None) -> str:
    """Name of a unit in the journal."""
    return "rest" if index is None else f"layer-{index:05d}"


class FinishedUnits:
    """See `moetools.pipeline.work.Finished`.

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
        self._layers = range(prefix)
        self._model: StreamedModel | None = None
        if writer.finished:
            staged = writer.staged(dict(config))
            view = packed_view(staged) if config.get("quantization_config") else staged
            self._model = StreamedModel(view, forward)

    def __call__(self, index: int | None) -> Mapping[str, Tensor] | None:
        if unit_name(index) not in self._writer.finished or self._model is None:
            return None
        if index is None:
            return self._model.checkpoint.read([*self._model.stock.names[None], *self._model.stock.extra_names])
        return self._model.stock.read_layer(index) if index in self._layers else None

    def facts(self, index: int | None) -> Mapping[str, Any]:
        return self._writer.payload(unit_name(index))["facts"]
