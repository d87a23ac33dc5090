"""The calibrated pass of quantization: every layer sees inputs that quantized layers give, and is then replaced.

Per layer: the inputs of its attention, then, behind quantized attention, the inputs of its experts, then, behind
quantized gates and ups, their intermediates; last the whole quantized layer runs once for the next one. No sample is
stored but the hidden states between layers: Hessians are sums over tokens that were really routed.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetools.architectures.weights import LayerWeights, stack_experts
from moetools.forward.activations import Activations
from moetools.forward.experts import RoutedCall, observe
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import announced
from moetools.forward.streaming import LoadedLayer, StreamedModel
from moetools.methods.quantize.base import Inputs
from moetools.passes.guided_refit import Guide, GuidedStreams, refit_down
from moetools.passes.layer_equations import family_activation, intermediate
from moetools.passes.layer_features import Routes
from moetools.passes.stored import NOTHING_STORED, ReplayedLayer, Stored, last_open
from moetools.passes.two_streams import residual_scale
from moetools.text.tokens import TokenBatch, TokenData

_ROOMS, _GUIDED_ROOMS = 2, 4
"""Of hidden states: those in front of the layer, and what its experts see; with a reference its own, and those behind
the layer without its experts."""


class QuantizePass:
    """Streams the model that is being quantized.

    Args:
        original: the model to quantize.
        data: calibration tokens; without them layers are only read, and nothing is known about their inputs.
        plan: see `quantize_plan`.
        stored: layers that are finished already.
        to_end: `behind` will be asked for behind the last layer, even if all layers are finished already.
        reference: the model that this one was made of; its hidden states are walked beside, see `passes.guided_refit`.
    """

    def __init__(
        self,
        original: StreamedModel,
        data: TokenData | None,
        plan: MemoryPlan,
        stored: Stored = NOTHING_STORED,
        *,
        to_end: bool = False,
        reference: StreamedModel | None = None,
    ) -> None:
        self.model = original
        self.batches = [original.on_device(batch) for batch in data.batches] if data else []
        self.num_tokens = data.num_tokens if data else 0
        self.plan, self._stored, self._to_end = plan, stored, to_end
        self.guide = None if reference is None else Guide(reference, self.batches, plan)

    def layers(self) -> Iterator["CalibratedLayer | ReplayedLayer"]:
        """Every layer in order; whatever weights it was given when the next one is asked for, it runs with."""
        layers = self.model.num_layers
        last = layers - 1 if self._to_end else last_open(self._stored, layers)
        self.hidden = self.room()
        self.model.embed(self.batches, self.hidden)
        with contextlib.ExitStack() as stack, announced(self.model, "quantizing", self.num_tokens) as progress:
            if self.guide is not None:
                self.guide.start()
                stack.callback(self.guide.close)
            for layer in self.model.layers(keep_native=True, fill=bool(self.batches), prefetch=self.plan.prefetch):
                progress.layer(layer.index)
                self._layer, tensors = layer, self._stored.get(layer.index)
                if self.guide is not None:
                    self.guide.advance()
                if tensors is None:
                    progress.phase("solving")
                    yield CalibratedLayer(self, layer)
                else:
                    if self.batches:
                        self.model.stock.fill_layer(layer.index, tensors)
                    yield ReplayedLayer(index=layer.index, tensors=tensors)
                if layer.index < last:
                    self._advance(layer)
            progress.advance(self.num_tokens)

    def room(self) -> Activations:
        """Room for one hidden state per token."""
        return self.model.activations(self.batches, self.plan)

    def behind(self) -> Iterator[tuple[TokenBatch, Tensor]]:
        """The hidden states behind the layer that was yielded last, batch by batch."""
        for number, batch in enumerate(self.batches):
            yield batch, self.model.run_layer(self._layer, batch, self.hidden[number])

    def _advance(self, layer: LoadedLayer) -> None:
        self.model.progress.phase("calibrating")
        for number, batch in enumerate(self.batches):
            self.hidden[number] = self.model.run_layer(layer, batch, self.hidden[number])
            self.model.progress.advance(batch.num_tokens)


def quantize_plan(
    original: StreamedModel,
    data: TokenData | None,
    *,
    beside: Sequence[StreamedModel] = (),
    solver: int = 0,
    guided: bool = False,
) -> MemoryPlan:
    """Where the bytes of a pass go.

    Args:
        beside: other models of which a layer is in memory.
        guided: one of them is the reference.
        solver: bytes that Hessians and the solver need at least.
    """
    batches = data.batches if data else ()
    rooms = _GUIDED_ROOMS if guided else _ROOMS
    return original.memory_plan(batches, keep_native=True, beside=beside, rooms=rooms, scratch=solver)


@dataclass(frozen=True, kw_only=True)
class _Routing:
    """Which real tokens of a batch go to which expert, sorted by expert."""

    token_S: Tensor
    weight_S: Tensor
    bounds: Sequence[tuple[int, int]]


class CalibratedLayer:
    """One layer of a calibrated pass.

    Attributes:
        loaded: the layer in the model.
        weights: canonical MoE weights as they are on disk; None for a dense layer.
    """

    def __init__(self, run: QuantizePass, layer: LoadedLayer) -> None:
        self._run, self.loaded, self.index, self.module = run, layer, layer.index, layer.module
        assert layer.native is not None
        self.native = layer.native
        self._moe = run.model.stock.moe_layers.get(layer.index)
        self.weights: LayerWeights | None = run.model.weights(layer) if self._moe else None
        self._inputs: Activations | None = None
        self._routing: list[_Routing] = []

    def linear_inputs(self, paths: Sequence[str], *, keep_experts: bool) -> list[tuple[list[str], Inputs | None]]:
        """What the linear layers `paths` see, in one run without the routed experts; those with one input together.

        Args:
            keep_experts: keep what the routed experts see, for `wide_inputs` and `inner_inputs`.
        """
        if not self._run.batches:
            return [([path], None) for path in paths]
        model, watched = self._run.model, LinearInputs(self._run.model.device)
        model.progress.phase("calibrating")
        calls: list[RoutedCall] = []
        if keep_experts and self._moe:
            self._inputs, self._routing = self._run.room(), []
        with contextlib.ExitStack() as stack:
            for path in paths:
                stack.callback(watched.watch(path, self.module.get_submodule(path)).remove)
            if self._moe:
                stack.enter_context(self._without_experts(calls))
            for number, batch in enumerate(self._run.batches):
                watched.next(batch)
                shape = model.run_layer(self.loaded, batch, self._run.hidden[number]).shape
                if calls:
                    self._keep(number, calls.pop(), batch, shape)
        model.progress.phase("solving")
        return watched.results()

    def _without_experts(self, calls: list[RoutedCall]) -> contextlib.AbstractContextManager[None]:
        """Until the context ends, the experts note what is routed to them in `calls` and add nothing."""
        assert self._moe is not None
        arch = self._run.model.arch
        return observe(
            self.module.get_submodule(self._moe.block),
            router=arch.router,
            experts=arch.experts,
            reads=frozenset(),
            callback=calls.append,
            compute=False,
        )

    def _keep(self, number: int, call: RoutedCall, batch: TokenBatch, shape: torch.Size) -> None:
        if self._inputs is None:
            return
        self._inputs[number] = call.hidden_TD.view(shape)
        token_S, weight_S, counts_E = call.token_S, call.weight_S, call.counts_E
        if batch.attention_mask is not None:
            real_S = batch.attention_mask.reshape(-1)[token_S]
            token_S, weight_S = token_S[real_S], weight_S[real_S]
            counts_E = torch.bincount(call.expert_S[real_S], minlength=counts_E.numel())
        ends = counts_E.cumsum(0).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        self._routing.append(_Routing(token_S=token_S, weight_S=weight_S[:, None], bounds=bounds))

    def wide_inputs(self, experts: Sequence[int]) -> Inputs | None:
        """What gate and up of the given experts see, weighted by the routing weight: H_e = mean of g^2 x x^T."""
        return self._expert_inputs(experts, None)

    def inner_inputs(self, experts: Sequence[int], weights: LayerWeights) -> Inputs | None:
        """What down of the given experts sees behind the gate and up of `weights`: H_e = mean of g^2 h h^T."""
        return self._expert_inputs(experts, weights)

    def _expert_inputs(self, experts: Sequence[int], weights: LayerWeights | None) -> Inputs | None:
        if self._inputs is None:
            return None
        assert self._moe is not None
        model = self._run.model
        activate = family_activation(self.module.get_submodule(self._moe.inside(model.arch.experts)))
        wide = None if weights is None else [stack_experts(weights, (expert,)) for expert in experts]
        width = model.hidden_size if weights is None else weights.up_EFD.shape[1]
        model.progress.phase("calibrating")
        gram_BII = torch.zeros(len(experts), width, width, device=model.device)
        count_B = torch.zeros(len(experts), dtype=torch.int64)
        for number, routing in enumerate(self._routing):
            hidden_TD = self._inputs[number].flatten(0, 1).to(model.device)
            for place, expert in enumerate(experts):
                start, end = routing.bounds[expert]
                if start == end:
                    continue
                seen = hidden_TD[routing.token_S[start:end]].float()
                if wide is not None:
                    seen = intermediate(wide[place], seen, activate)
                seen = seen * routing.weight_S[start:end]
                gram_BII[place].addmm_(seen.T, seen)
                count_B[place] += end - start
        model.progress.phase("solving")
        return _mean(gram_BII, count_B)

    def refitted(self, weights: LayerWeights) -> LayerWeights:
        """The layer's experts with down projections that are solved for the reference; as given without one."""
        run, model = self._run, self._run.model
        if run.guide is None or self._inputs is None:
            return weights
        assert self._moe is not None
        model.progress.phase("calibrating")
        calls: list[RoutedCall] = []
        without = run.room()
        with self._without_experts(calls):
            for number, batch in enumerate(run.batches):
                without[number] = model.run_layer(self.loaded, batch, run.hidden[number])
                calls.clear()
        model.progress.phase("solving")
        streams = GuidedStreams(
            original=model,
            batches=run.batches,
            inputs=self._inputs,
            without=without,
            before=run.guide.before,
            scale=residual_scale(self.loaded),
        )
        activate = family_activation(self.module.get_submodule(self._moe.inside(model.arch.experts)))
        return refit_down(streams, dict(enumerate(map(_routes, self._routing))), weights, activate, run.plan)

    def expert_errors(self, candidates: Sequence[LayerWeights]) -> Tensor:
        """What each expert's output loses with other weights: [J, E] sums over its slots of g^2 ||f_j(x) - f(x)||^2.

        On every fourth batch at least, scaled up to all tokens.
        """
        assert self._inputs is not None
        assert self._moe is not None
        assert self.weights is not None
        device, every = self._run.model.device, max(1, min(4, len(self._routing) // 4))
        activate = family_activation(self.module.get_submodule(self._moe.inside(self._run.model.arch.experts)))
        errors_JE = torch.zeros(len(candidates), self.weights.num_experts, dtype=torch.float64)
        for expert in range(self.weights.num_experts):
            original = stack_experts(self.weights, (expert,))
            others = [stack_experts(candidate, (expert,)) for candidate in candidates]
            for number in range(0, len(self._routing), every):
                routing = self._routing[number]
                start, end = routing.bounds[expert]
                if start == end:
                    continue
                seen = self._inputs[number].flatten(0, 1).to(device)[routing.token_S[start:end]]
                wanted = intermediate(original, seen, activate) @ original.down_DW.T
                for choice, other in enumerate(others):
                    lost = intermediate(other, seen, activate) @ other.down_DW.T - wanted
                    errors_JE[choice, expert] += (lost * routing.weight_S[start:end]).square().sum().item()
        return errors_JE * (len(self._routing) / len(range(0, len(self._routing), every)))

    def behind_energy(self) -> float:
        """Mean squared norm of the hidden states behind the layer, on the first batch."""
        run = self._run
        return run.model.run_layer(self.loaded, run.batches[0], run.hidden[0]).float().square().sum(-1).mean().item()

    @property
    def num_tokens(self) -> int:
        """Calibration tokens of the pass."""
        return self._run.num_tokens

    def set_linear(self, path: str, weight_OI: Tensor) -> None:
        """Give a linear layer its quantized weight, for the runs that follow."""
        self._fill({f"{path}.weight": weight_OI})

    def set_experts(self, weights: LayerWeights) -> None:
        """Give the routed experts their quantized weights, for the runs that follow."""
        self._fill(self._run.model.stock.with_weights(self.index, self.native, weights, only_changed=True))

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        self.native = {**self.native, **tensors}
        if self._run.batches:
            self._run.model.stock.fill_layer(self.index, tensors)


def _routes(routing: _Routing) -> Routes:
    weight_S = routing.weight_S[:, 0]
    return Routes(
        tokens=[routing.token_S[start:end] for start, end in routing.bounds],
        weights=[weight_S[start:end] for start, end in routing.bounds],
    )


class LinearInputs:
    """Adds up x x^T over the real tokens that linear layers see; layers that are given one tensor share the sum."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._grams: dict[str, Tensor] = {}
        self._groups: dict[str, list[str]] = {}
        self._current: dict[str, Tensor] = {}
        self._count = 0
        self._real_T: Tensor | None = None

    def watch(self, path: str, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(lambda _module, args: self._see(path, args[0]))

    def next(self, batch: TokenBatch) -> None:
        """What follows belongs to `batch`."""
        self._current = {}
        self._real_T = None if batch.attention_mask is None else batch.attention_mask.reshape(-1)
        self._count += batch.num_tokens

    def _see(self, path: str, seen: Tensor) -> None:
        leader = next((other for other, tensor in self._current.items() if tensor is seen), path)
        group = self._groups.setdefault(leader, [])
        if path not in group:
            group.append(path)
        if leader != path:
            return
        self._current[path] = seen
        rows = seen.detach().flatten(0, -2).float()
        if self._real_T is not None:
            rows = rows[self._real_T]
        if path not in self._grams:
            self._grams[path] = torch.zeros(rows.shape[1], rows.shape[1], device=self._device)
        self._grams[path].addmm_(rows.T, rows)

    def results(self) -> list[tuple[list[str], Inputs | None]]:
        count = torch.tensor([self._count])
        return [(group, _mean(self._grams[leader][None], count)) for leader, group in self._groups.items()]


def _mean(gram_BII: Tensor, count_B: Tensor) -> Inputs:
    per_slot = 1 / count_B.clamp_min(1).to(gram_BII)
    return Inputs(hessian_BII=gram_BII * per_slot[:, None, None], count_B=count_B)
