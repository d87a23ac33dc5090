"""A trial run without weights: what a family's decoder hands its layers, and what they hand on.

The whole model runs once on the meta device, where only shapes are computed. Tensors that come from the token ids, and
those that come from a layer, are of classes of their own; whatever is computed from one is of its class again. So the
trial proves which arguments of the layers are the same for all batches of one shape, and that nothing but the hidden
states goes from one layer to the next.
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_config: Any = importlib.import_module("torch.fx.experimental._config")
_IDS = (2, 6)


class _FromTokens(Tensor):
    pass


class _FromLayer(_FromTokens):
    pass


@dataclass(frozen=True, kw_only=True)
class LayerFlow:
    """How a family's decoder layers are called.

    Attributes:
        tail: sizes of the hidden states between two layers behind [B, N]: (D,), or (C, D) for C parallel streams.
        returned: for each layer, how many values it returns; None for a bare tensor.
        constant: whether the arguments beside the hidden states are the same for all batches of one shape.
        carried: what else goes from layer to layer, in words; None for nothing.
        idle: modules outside the layers that text does not need (vision towers), by path.
        problem: why the trial could not be run to its end; the other attributes are then assumptions.
    """

    tail: tuple[int, ...]
    returned: tuple[int | None, ...]
    constant: bool = True
    carried: str | None = None
    idle: tuple[str, ...] = ()
    problem: str | None = None


def try_layers(model: Any, decoder_path: str) -> LayerFlow:
    """Run `model`, whose parameters are on the meta device, once, and tell what its layers get and return."""
    decoder: Any = model.get_submodule(decoder_path)
    width = model.config.get_text_config().hidden_size
    watch = _Watch(LayerFlow(tail=(width,), returned=()))
    ids = torch.zeros(_IDS, dtype=torch.long, device="meta").as_subclass(_FromTokens)
    called: set[str] = set()
    try:
        with _without_numbers(model), watch.layers(decoder.layers), _noting_calls(model, called), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # noqa: BLE001 - a family's own code, in a place it was not written for
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        returned = (*watch.flow.returned, *[None] * len(decoder.layers))[: len(decoder.layers)]
        return replace(watch.flow, constant=False, problem=problem, returned=returned)
    return replace(watch.flow, idle=_idle(model, decoder_path, called))


class _Watch:
    """Notes what the layers of one forward get and return."""

    def __init__(self, flow: LayerFlow) -> None:
        self.flow = flow
        self._last: Tensor | None = None
        self._before: dict[str, Any] = {}

    @contextlib.contextmanager
    def layers(self, layers: nn.ModuleList) -> Iterator[None]:
        handles = []
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        others = {**{f"argument {place}": value for place, value in enumerate(args[1:], 1)}, **kwargs}
        others.pop("hidden_states", None)
        if self._last is None:
            self.flow = replace(self.flow, tail=tuple(hidden.shape[2:]))
        elif hidden is not self._last:
            self._carry("hidden states that the decoder changes between layers")
        for name, value in others.items():
            kinds = {type(tensor) for tensor in _tensors(value)}
            if _FromLayer in kinds:
                self._carry(f"'{name}'")
            elif _FromTokens in kinds:
                self.flow = replace(self.flow, constant=False)
        self._before = {name: _contents(value) for name, value in others.items()}
        return tuple(map(_plain, args)), {name: _plain(value) for name, value in kwargs.items()}

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        for name, value in kwargs.items():
            if name in self._before and _contents(value) != self._before[name]:
                self._carry(f"'{name}', which layers change")
        values = output if isinstance(output, tuple) else (output,)
        marked = [value.as_subclass(_FromLayer) if isinstance(value, Tensor) else value for value in values]
        self._last = marked[0]
        count = len(values) if isinstance(output, tuple) else None
        self.flow = replace(self.flow, returned=(*self.flow.returned, count))
        return tuple(marked) if isinstance(output, tuple) else marked[0]

    def _carry(self, what: str) -> None:
        if self.flow.carried is None:
            self.flow = replace(self.flow, carried=what)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _contents(value: Any) -> Any:
    """What a changeable container holds, to be compared; None for anything else."""
    if isinstance(value, Mapping):
        return {key: (id(inner), _contents(inner)) for key, inner in value.items()}
    if isinstance(value, list):
        return [(id(inner), _contents(inner)) for inner in value]
    return None


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


class _Answers(TorchDispatchMode):
    """Answers a family's questions about values that do not exist: yes, and one.

    They are asked of masks, whether all positions are tokens, and of positions, whether all are one sequence.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _without_numbers(model: Any) -> Iterator[None]:
    """Experts that need shapes only, and answers where there are no values."""
    # Blocks with their own number of experts have configs of their own.
    configs = {id(one.config): one.config for one in model.modules() if hasattr(one, "config")}
    before = {key: one._experts_implementation for key, one in configs.items()}
    for one in configs.values():
        one._experts_implementation = "batched_mm"
    try:
        with _Answers(), _config.patch(meta_nonzero_assume_all_nonzero=True):
            yield
    finally:
        for key, one in configs.items():
            one._experts_implementation = before[key]


@contextlib.contextmanager
def _noting_calls(model: nn.Module, called: set[str]) -> Iterator[None]:
    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    handles = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _idle(model: Any, decoder_path: str, called: set[str]) -> tuple[str, ...]:
    """Modules beside the way from the root to the decoder of which no part was called."""
    needed = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    found, path, inner = [], "", model
    for step in decoder_path.split("."):
        for name, child in inner.named_children():
            place = f"{path}{name}"
            parts = {place, *(f"{place}.{deeper}" for deeper, _ in child.named_modules() if deeper)}
            if name != step and not parts & called and not any(id(module) in needed for module in child.modules()):
                found.append(place)
        path, inner = f"{path}{step}.", inner.get_submodule(step)
    return tuple(found)
