"""Compress layer after layer: every layer is decided, repaired and run again behind the already compressed ones."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetools.architectures.weights import LayerWeights, WideExpert
from moetools.forward.experts import RoutedCall, observe
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import LoadedLayer, StreamedModel
from moetools.methods.base import LayerSample, Route
from moetools.methods.joint_refit import RefitBounds
from moetools.passes.layer_equations import Activate, family_activation
from moetools.passes.layer_features import LayerFeatures, MemberFeatures, Routes
from moetools.passes.stored import NOTHING_STORED, ReplayedLayer, Stored, last_open
from moetools.passes.two_streams import KeepingObserver, Split, TwoStreams
from moetools.statistics.base import State
from moetools.text.tokens import TokenBatch, TokenData

ROUTER_TOKENS = 8192
"""Sampled tokens that router rows are fitted to, about."""
_METHOD_SAMPLE = 1024
_PASSED_ON = 0.05
_COUNT = re.compile(r"(n|num)_(routed_|local_)?experts")
"""Attributes of stock modules that count experts."""


class SequentialLayer:
    """One MoE layer of a sequential pass, between its measurement and its replacement.

    Attributes:
        statistics: accumulators measured behind the compressed layers.
        hidden_ND, logits_NE: a sample of the block's inputs and of the original router's logits for them.
        weights: the original's.
        num_tokens: of the whole calibration text.
        activate: the family's own activation on canonical gate and up pre-activations.
    """

    def __init__(
        self, run: "SequentialPass", layer: LoadedLayer, statistics: dict[str, State], hidden: Tensor, logits: Tensor
    ) -> None:
        self._run, self.layer, self.index = run, layer, layer.index
        self.statistics, self.hidden_ND, self.logits_NE = statistics, hidden, logits
        self.weights, self.num_tokens = run.original.weights(layer), run.data.num_tokens
        block = run.original.stock.moe_layers[layer.index].block
        self.activate: Activate = family_activation(layer.module.get_submodule(f"{block}.{run.original.arch.experts}"))

    def routes(self, weights: LayerWeights, *, every: int = 1) -> dict[int, Routes]:
        """What the router of `weights` does with the compressed stream, in every so many batches."""
        return self._run.routes(self, weights, every)

    def features(self, experts: Sequence[WideExpert], weights: LayerWeights, *, every: int = 1) -> LayerFeatures:
        """The layer's least-squares problem with the given experts, routed by `weights`' router."""
        run, routes = self._run, self.routes(weights, every=every)
        return LayerFeatures(run, routes, experts, self.activate, nbytes=run.feature_bytes)

    def member_features(
        self,
        routes: Mapping[int, Routes],
        number: int,
        expert: WideExpert,
        members: Sequence[tuple[WideExpert, float]],
    ) -> MemberFeatures:
        """The problem of one merged expert that should give the weighted mean of its members' outputs."""
        alone = {batch: found.unweighted(number) for batch, found in routes.items()}
        return MemberFeatures(self._run, alone, expert, self.activate, members=members, nbytes=self._run.feature_bytes)

    def train_count(self, routes: Mapping[int, Routes], expert: int) -> int:
        """Tokens to solve with that go to an expert."""
        return sum(int(self._run.rows(batch, False)[found.tokens[expert]].sum()) for batch, found in routes.items())

    @property
    def bounds(self) -> RefitBounds:
        """What solving may take."""
        return self._run.bounds

    def sample(self, size: int = _METHOD_SAMPLE) -> LayerSample:
        """At most `size` of the sampled tokens, with the family's activation and its routing among some experts."""
        step = max(1, len(self.hidden_ND) // size)
        return LayerSample(
            hidden_ND=self.hidden_ND[::step],
            logits_NE=self.logits_NE[::step],
            activate=self.activate,
            route=self._run.route(self, self.hidden_ND[::step]),
        )

    def router_agreement(self, weights: LayerWeights, exact_NC: Tensor) -> float | None:
        """Share of the sample's choices that the router of `weights` shares with one that gave these logits.

        Both choose by the family's own rule, with the correction biases and groups of the smaller model. None for a
        family whose router changes its inputs before it multiplies them.
        """
        return self._run.router_agreement(self, weights, exact_NC)

    def finish(self, weights: LayerWeights) -> None:
        """Run the compressed stream through the layer with its new weights."""
        self._run.finish(self, weights)


class SequentialPass(TwoStreams):
    """Streams the original and the compressed model side by side.

    Args:
        original: the model to compress.
        smaller: the same checkpoint with the new config, whose layers are handed over.
        names: statistics to measure behind the compressed layers.
        plan: see `streams_plan`.
        stored: layers that are finished already.
    """

    def __init__(
        self,
        original: StreamedModel,
        smaller: StreamedModel,
        data: TokenData,
        names: Sequence[str],
        plan: MemoryPlan,
        stored: Stored = NOTHING_STORED,
    ) -> None:
        super().__init__(original, data, names, plan, sample_tokens=ROUTER_TOKENS)
        self.smaller, self._stored = smaller, stored

    def layers(self) -> Iterator[LoadedLayer | SequentialLayer | ReplayedLayer]:
        """Every layer in order; a MoE layer comes as `SequentialLayer`, and `finish` must be called on it."""
        last = last_open(self._stored, self.original.num_layers)
        for layer in self.walk("compressing"):
            tensors = self._stored.get(layer.index)
            if tensors is not None:
                if layer.index < last:
                    self._replay(layer, tensors)
                yield ReplayedLayer(index=layer.index, tensors=tensors)
            elif layer.index in self.original.stock.moe_layers:
                states, sample = self.measure(layer)
                yield SequentialLayer(self, layer, states, *sample.result())
            else:
                self.keep(layer)
                yield layer

    def enter(self) -> bool:
        if not self.smaller.own_entry:
            return True
        self.smaller.embed(self.batches, self.after)
        return False

    def split(self, layer: LoadedLayer, batch: TokenBatch, hidden: Tensor, seen: KeepingObserver) -> Split:
        behind = self.original.run_layer(layer, batch, hidden)
        assert seen.routed_TD is not None
        assert seen.hidden_TD is not None
        without = behind - self.scale * seen.routed_TD.view(behind.shape)
        return Split(inputs=seen.hidden_TD.view(behind.shape), without=without, behind=behind)

    def _replay(self, layer: LoadedLayer, tensors: Mapping[str, Tensor]) -> None:
        if layer.index in self.original.stock.moe_layers:
            self.repeat(layer)
            self._finish(layer.index, tensors)
        else:
            self.keep(layer)

    def _block(self, layer: SequentialLayer, weights: LayerWeights) -> nn.Module:
        """The smaller model's MoE block with the new router (and experts), ready to run."""
        assert layer.layer.native is not None
        return self._filled(layer.index, self.original.stock.with_weights(layer.index, layer.layer.native, weights))

    def _filled(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        moe = self.original.stock.moe_layers[index]
        return self.smaller.stock.fill_layer(index, tensors).get_submodule(moe.block)

    def _routed(self, block: nn.Module, numbers: Sequence[int], *, compute: bool) -> Iterator[tuple[int, RoutedCall]]:
        """What the new router does with the compressed stream's block inputs; experts run only if `compute`."""
        calls: list[RoutedCall] = []
        arch = self.original.arch
        reads: frozenset[Any] = frozenset({"output"}) if compute else frozenset()
        with observe(
            block, router=arch.router, experts=arch.experts, reads=reads, callback=calls.append, compute=compute
        ):
            for number in numbers:
                block(self.inputs[number].to(self.original.device))
                yield number, calls.pop()

    def routes(self, layer: SequentialLayer, weights: LayerWeights, every: int) -> dict[int, Routes]:
        block = self._block(layer, weights)
        found = {number: Routes.of(call) for number, call in self._routed(block, self.some(every), compute=False)}
        self.smaller.stock.free_layer(layer.index)
        return found

    def route(self, layer: SequentialLayer, hidden_ND: Tensor) -> Route:
        """The smaller model's routing of some block inputs when only the given experts are there."""
        ready: list[bool] = []

        def route(_logits_NC: Tensor, kept_C: Tensor) -> tuple[Tensor, Tensor]:
            chosen = layer.weights.select(kept_C)
            if not ready:
                self._block(layer, chosen)
                ready.append(True)
            block = self.smaller.stock.set_router(layer.index, chosen)
            with _counting(block, self._count(), len(kept_C)):
                call = self._call(block, hidden_ND)
            return call.topk_index_TK, call.topk_weight_TK

        return route

    def _count(self) -> int:
        """Experts that the smaller model's modules were built for."""
        count = self.smaller.arch.num_experts(self.smaller.config)
        assert count is not None
        return count

    def _call(self, block: nn.Module, hidden_ND: Tensor) -> RoutedCall:
        """What the block's router does with some inputs; the experts do not run."""
        calls: list[RoutedCall] = []
        arch = self.original.arch
        with observe(
            block, router=arch.router, experts=arch.experts, reads=frozenset(), callback=calls.append, compute=False
        ):
            block(hidden_ND[None].to(self.smaller.dtype))
        return calls[0]

    def router_agreement(self, layer: SequentialLayer, weights: LayerWeights, exact_NC: Tensor) -> float | None:
        block = self._block(layer, weights)
        chosen = [self._call(block, rows_ND).topk_index_TK for rows_ND in layer.hidden_ND.split(_METHOD_SAMPLE)]
        bias = weights.router_bias_E
        # Rows of the identity: the router sees the exact logits as its inputs and passes them on.
        passing = torch.eye(*weights.router_ED.shape).to(weights.router_ED)
        unchanged = replace(weights, router_ED=passing, router_bias_E=None if bias is None else torch.zeros_like(bias))
        block = self.smaller.stock.set_router(layer.index, unchanged)
        padded_ND = nn.functional.pad(exact_NC, (0, weights.router_ED.shape[1] - exact_NC.shape[1]))
        calls = [self._call(block, rows_ND) for rows_ND in padded_ND.split(_METHOD_SAMPLE)]
        self.smaller.stock.free_layer(layer.index)
        seen_NC = torch.cat([call.router_logits_TE for call in calls])
        if not torch.allclose(seen_NC, exact_NC, rtol=_PASSED_ON, atol=_PASSED_ON):
            return None
        wanted = torch.cat([call.topk_index_TK for call in calls])
        return (torch.cat(chosen)[:, :, None] == wanted[:, None]).any(2).float().mean().item()

    def finish(self, layer: SequentialLayer, weights: LayerWeights) -> None:
        assert layer.layer.native is not None
        self._finish(layer.index, self.original.stock.with_weights(layer.index, layer.layer.native, weights))

    def _finish(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        block = self._filled(index, tensors)
        for number, call in self._routed(block, range(len(self.batches)), compute=True):
            assert call.routed_TD is not None
            self.add(number, call.routed_TD)
        self.smaller.stock.free_layer(index)


@contextmanager
def _counting(block: nn.Module, built_for: int, count: int) -> Iterator[None]:
    """The block's modules speak of `count` experts: group-limited routers part the scores by that number."""
    named = [
        (module, name)
        for module in block.modules()
        for name, value in vars(module).items()
        if _COUNT.fullmatch(name) and value == built_for
    ]
    for module, name in named:
        setattr(module, name, count)
    try:
        yield
    finally:
        for module, name in named:
            setattr(module, name, built_for)
