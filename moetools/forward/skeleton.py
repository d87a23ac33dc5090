"""A model with stand-ins for its decoder layers: the family's own code before the first layer and after the last.

Embedding, attention masks, rotary tables, final norm, head and logit scaling differ between families. Running the
model's own forward with layers that only note their arguments gives all of them without knowing any.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moetools.forward.trial import LayerFlow
from moetools.text.tokens import TokenBatch

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments a decoder layer gets beside the hidden states."""

_CACHED_SHAPES = 8


class Skeleton:
    """Runs everything of `model` but its decoder layers.

    Hidden states are [B, N, W] here and in all that runs a model layer by layer: parallel streams lie side by side.

    Args:
        model: a causal language model whose modules outside the decoder layers have their weights.
        decoder_path: path of the module that owns `layers`.
        flow: what the layers get and return.
    """

    def __init__(self, model: nn.Module, decoder_path: str, flow: LayerFlow) -> None:
        self._flow = flow
        self._calls: list[LayerCall] = []
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self._cache: OrderedDict[tuple[int, ...], list[LayerCall]] = OrderedDict()
        self._model, decoder = _copy_path(model, decoder_path)
        layers = [StandIn(layer, self._visit) for layer in decoder.layers]
        self._num_layers = len(layers)
        decoder.layers = nn.ModuleList(layers)

    def enter(self, batch: TokenBatch) -> tuple[Tensor, list[LayerCall]]:
        """Hidden states that enter the first layer, and each layer's other arguments."""
        self._last = None
        with contextlib.suppress(Reached):
            self._run(batch)
        assert self._first is not None, "the decoder called its first layer"
        return self._first.flatten(2), self._calls

    def calls(self, batch: TokenBatch) -> list[LayerCall]:
        """Each layer's arguments; batches of one shape without padding share them where they depend on nothing else."""
        if batch.attention_mask is not None or not self._flow.constant:
            return self.enter(batch)[1]
        shape = tuple(batch.input_ids.shape)
        if shape not in self._cache:
            self._cache[shape] = self.enter(batch)[1]
            if len(self._cache) > _CACHED_SHAPES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shape)
        return self._cache[shape]

    def logits(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """[B, N, V] logits from the hidden states behind the last layer."""
        self._last = hidden.unflatten(2, self._flow.tail)
        return self._run(batch).logits

    def run(self, module: nn.Module, index: int, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Hidden states behind layer `index`, which `module` is, from those before it."""
        args, kwargs = self.calls(batch)[index]
        result = module(hidden.unflatten(2, self._flow.tail), *args, **kwargs)
        return (result[0] if isinstance(result, tuple) else result).flatten(2)

    def _run(self, batch: TokenBatch) -> Any:
        self._calls = []
        self._first = None
        mask = None if batch.attention_mask is None else batch.attention_mask.long()
        return self._model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)

    def _visit(self, hidden: Tensor, call: LayerCall) -> Any:
        if not self._calls:
            self._first = hidden
        self._calls.append(call)
        if len(self._calls) == self._num_layers:
            if self._last is None:
                raise Reached
            hidden = self._last
        count = self._flow.returned[len(self._calls) - 1]
        return hidden if count is None else (hidden, *[None] * (count - 1))


class Reached(Exception):  # noqa: N818 - not an error: the last layer's arguments are noted, nothing behind it is wanted
    pass


class StandIn(nn.Module):
    """Takes a decoder layer's place: notes its arguments and answers for its attributes."""

    def __init__(self, layer: nn.Module, visit: Callable[[Tensor, LayerCall], Any]) -> None:
        super().__init__()
        self.__dict__["_layer"], self.__dict__["_visit"] = layer, visit

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._visit(hidden_states, (args, kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


def _copy_path(model: nn.Module, path: str) -> tuple[nn.Module, Any]:
    """Copies of the modules from the root to `path`, sharing every other module with the original."""
    root = shallow(model)
    inner = root
    for name in filter(None, path.split(".")):
        child = shallow(inner._modules[name])
        inner._modules[name] = child
        inner = child
    return root, inner


def shallow(module: Any) -> Any:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone
