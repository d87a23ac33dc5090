"""An encoder-decoder model as one walk through its layers: the encoder's, then the decoder's.

A batch's hidden states [B, N, D] are those of the prompt (`TokenBatch.source` columns) beside those of the completion.
Encoder layers change the former; decoder layers change the latter and read the former, which the encoder's own code
behind its last layer (the final norm) has been through.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moetools.forward.skeleton import LayerCall, Reached, StandIn, shallow
from moetools.forward.trial import LayerFlow
from moetools.text.tokens import TokenBatch

if TYPE_CHECKING:
    from moetools.forward.stock import StockModel

_RELATIVE = "layer.0.SelfAttention"
_VALUES = 3
"""A T5 layer returns hidden states and two position biases, which the layers behind it get."""


def stack_flow(stock: "StockModel") -> LayerFlow:
    """How T5's layers are called: `StackSkeleton` hands on what they hand on."""
    width = stock.model.config.hidden_size
    return LayerFlow(tail=(width,), returned=(_VALUES,) * stock.num_layers, constant=False)


class StackSkeleton:
    """Runs everything of an encoder-decoder model but its layers; `Skeleton`'s counterpart.

    Args:
        stock: the model, whose modules outside the layers have their weights.
    """

    def __init__(self, stock: "StockModel") -> None:
        self._model = shallow(stock.model)
        self._calls: list[LayerCall] = []
        self._entered: list[Tensor] = []
        self._memory: Tensor | None = None
        self._last: Tensor | None = None
        self._bias: Tensor | None = None
        self._biases: dict[int, Callable[[int, int], Tensor]] = {}
        self._num_layers = stock.num_layers
        first = 0
        for path in stock.stacks:
            self._biases[first] = _position_bias(stock, first)
            owner, _, leaf = path.partition(".")
            stack = shallow(self._model._modules[owner])
            self._model._modules[owner] = stack
            layers = [StandIn(layer, self._visit) for layer in getattr(stack, leaf)]
            setattr(stack, leaf, nn.ModuleList(layers))
            self._depth, first = first, first + len(layers)

    def enter(self, batch: TokenBatch) -> tuple[Tensor, list[LayerCall]]:
        """Hidden states that enter the first layer of each stack, side by side, and each layer's other arguments."""
        self._memory = None
        calls = self._noted(batch)
        return torch.cat(self._entered, 1), calls

    def run(self, module: nn.Module, index: int, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Hidden states behind layer `index`, which `module` is, from those before it."""
        source, target = hidden[:, : batch.source], hidden[:, batch.source :]
        encodes = index < self._depth
        self._memory = None if encodes else source
        args, kwargs = self._noted(batch)[index]
        behind = module(source if encodes else target, *args, **kwargs)[0]
        return torch.cat([behind, target] if encodes else [source, behind], 1)

    def logits(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """[B, N, V] logits of the completion's tokens from the hidden states behind the last layer."""
        completion = batch.input_ids[:, batch.source :]
        self._memory, self._last = None, hidden[:, batch.source :]
        return self._run(completion, None, completion).logits

    def _noted(self, batch: TokenBatch) -> list[LayerCall]:
        self._last = None
        mask = None if batch.attention_mask is None else batch.attention_mask[:, : batch.source].long()
        with contextlib.suppress(Reached):
            self._run(batch.input_ids[:, : batch.source], mask, batch.input_ids[:, batch.source :])
        return self._calls

    def _run(self, prompt: Tensor, mask: Tensor | None, completion: Tensor) -> Any:
        self._calls, self._entered = [], []
        return self._model(input_ids=prompt, attention_mask=mask, decoder_input_ids=completion, use_cache=False)

    def _visit(self, hidden: Tensor, call: LayerCall) -> Any:
        index = len(self._calls)
        self._calls.append(call)
        if index in self._biases:
            self._entered.append(hidden)
            self._bias = self._biases[index](hidden.shape[1], hidden.shape[1])
        if index == self._depth - 1 and self._memory is not None:
            hidden = self._memory
        if index == self._num_layers - 1:
            if self._last is None:
                raise Reached
            hidden = self._last
        return hidden, self._bias, None


def _position_bias(stock: "StockModel", index: int) -> Callable[[int, int], Tensor]:
    """What a stack's first layer, `index`, computes from its table of relative positions for all layers behind it."""
    attention: Any = shallow(stock.layer(index).get_submodule(_RELATIVE))
    name = stock.disk_name(index, f"{_RELATIVE}.relative_attention_bias.weight")
    assert name is not None
    table = stock.checkpoint.read([name])[name].to(stock.device, stock.dtype)
    attention._modules["relative_attention_bias"] = nn.Embedding.from_pretrained(table)
    return attention.compute_bias
