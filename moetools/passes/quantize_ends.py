"""Quantize what lies outside the decoder layers: the embeddings in front of them and the head behind them."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.forward.streaming import StreamedModel
from moetools.methods.quantize.base import Inputs
from moetools.methods.quantize.rtn import METHOD as RTN
from moetools.passes.quantize_layer import LayerQuantizer, QuantizedLayer
from moetools.passes.quantize_pass import LinearInputs
from moetools.passes.quantize_places import Place
from moetools.text.tokens import TokenBatch

_SCRATCH_PER_WEIGHT = 20


class EndsQuantizer:
    """Embeddings are rounded to nearest, for a row is looked up and multiplies nothing; a head of its own is a linear
    layer like others and is rounded by the run's method behind the quantized layers. A tied head is the embeddings,
    and where a copy of them is stored for it, it gets their codes.

    Args:
        models: those that are to run with the result; the first is the calibrated one.
        places: embeddings and head, as far as they are to be quantized.
        stored: by name on disk, what a finished run made of them, as a loader has it; nothing is solved then.

    Attributes:
        result: what became of them; `native` has whole names on disk. Of stored ones only that.
    """

    def __init__(
        self,
        quantizer: LayerQuantizer,
        models: Sequence[StreamedModel],
        places: Sequence[Place],
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._quantizer, self._models, self._places, self._stored = quantizer, models, places, stored
        self.result = QuantizedLayer(index=None, native={}, quantized={}, reports={})
        lookup = models[0].stock.model.get_input_embeddings()
        paths = [place.path for place in places if _module(place, models[0]) is lookup]
        self._head = next((place for place in places if _is_apart(place, paths, models[0])), None)

    @property
    def has_head(self) -> bool:
        """Whether there is a head to quantize that is not the embeddings, and not stored."""
        return self._head is not None and self._stored is None

    def embeddings(self) -> None:
        """Quantize the embeddings, before the first layer runs; put everything in its place if it is stored."""
        for place in self._places:
            if self._stored is not None:
                self._set(place, self._stored[place.name])
            elif place is not self._head:
                self._quantize(place, None, nearest=True)

    def head(self, behind: Iterable[tuple[TokenBatch, Tensor]]) -> None:
        """Quantize the head for what it sees.

        Args:
            behind: hidden states behind the last layer; none for a run without data.
        """
        assert self._head is not None
        model = self._models[0]
        watched = LinearInputs(model.device)
        handle = watched.watch("head", _module(self._head, model))
        try:
            for batch, hidden in behind:
                watched.next(batch)
                model.skeleton.logits(batch, hidden)
        finally:
            handle.remove()
        seen = [inputs for _, inputs in watched.results()]
        self._quantize(self._head, seen[0] if seen else None, nearest=False)

    def _quantize(self, place: Place, inputs: Inputs | None, *, nearest: bool) -> None:
        model = self._models[0]
        weight_OI = model.checkpoint.read([place.name])[place.name]
        dtype = TORCH_DTYPES[model.checkpoint.tensors[place.name].dtype]
        solved, report = self._quantizer.solve(
            weight_OI[None].to(model.device), self._quantizer.grids[place.name], inputs, method=RTN if nearest else None
        )
        value_OI = self._quantizer.values(solved, dtype)[0]
        self.result.quantized[place.name], self.result.reports[place.path or place.name] = solved, report
        self._set(place, value_OI)

    def _set(self, place: Place, value_OI: Tensor) -> None:
        self.result.native[place.name] = value_OI
        for one in self._models:
            with torch.no_grad():
                one.skeleton  # noqa: B018 - loads what is outside the layers
                _module(place, one).get_parameter("weight").copy_(value_OI)


def scratch_of_ends(places: Sequence[Place]) -> int:
    """Memory that embeddings or a head take while they are quantized."""
    return max((_SCRATCH_PER_WEIGHT * place.shape[0] * place.shape[1] for place in places), default=0)


def _is_apart(place: Place, lookups: Sequence[str | None], model: StreamedModel) -> bool:
    """Whether a head's weights are its own: neither the embeddings nor tied to them."""
    tied = any(model.stock.ties(f"{place.path}.weight", f"{path}.weight") for path in lookups)
    return place.path not in lookups and not tied


def _module(place: Place, model: StreamedModel) -> nn.Module:
    assert place.path is not None
    return model.stock.model.get_submodule(place.path)
