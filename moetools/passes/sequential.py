"""Compress layer after layer: every layer is decided, repaired and run again behind the already compressed ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetools.architectures.weights import LayerWeights, WideExpert, stack_experts
from moetools.forward.experts import RoutedCall, observe
from moetools.forward.streaming import LoadedLayer, StreamedModel
from moetools.methods.base import FEW_TOKENS, ExpertDecision, LayerSample, Route
from moetools.methods.joint_refit import JointSolver, RefitBounds
from moetools.passes.layer_equations import Activate, family_activation
from moetools.passes.layer_features import LayerFeatures, MemberFeatures, Routes
from moetools.passes.stored import ReplayedLayer, Stored, last_open, nothing_stored
from moetools.passes.token_counts import check_token_counts
from moetools.passes.two_streams import KeepingObserver, Split, TwoStreams
from moetools.statistics.base import State
from moetools.text.tokens import TokenBatch, TokenData

_SAMPLE_TOKENS = 8192
_METHOD_SAMPLE = 1024


class SequentialLayer:
    """One MoE layer of a sequential pass, between its measurement and its replacement.

    Attributes:
        statistics: accumulators measured behind the compressed layers.
        hidden_ND, logits_ND: a sample of the block's inputs and of the original router's logits for them.
    """

    def __init__(
        self, run: "SequentialPass", layer: LoadedLayer, statistics: dict[str, State], hidden: Tensor, logits: Tensor
    ) -> None:
        self._run, self.layer, self.index = run, layer, layer.index
        self.statistics, self.hidden_ND, self.logits_NE = statistics, hidden, logits
        self.weights = run.original.weights(layer)

    def features(self, experts: Sequence[WideExpert], weights: LayerWeights, *, every: int = 1) -> LayerFeatures:
        """The layer's least-squares problem with the given experts, routed by `weights`' router.

        Every seventh sequence is held out. `every` > 1 uses only every so many batches.
        """
        return self._run.features(self, experts, weights, every)

    @property
    def bounds(self) -> RefitBounds:
        """What solving it may take."""
        return self._run.bounds

    def refit_to_members(
        self,
        experts: Sequence[WideExpert],
        decision: ExpertDecision,
        weights: LayerWeights,
    ) -> tuple[list[WideExpert], dict[str, Any]]:
        """New down projections for the members' mean outputs; see `member_refit`."""
        return self._run.member_refit(self, experts, decision, weights)

    def sample(self, size: int = _METHOD_SAMPLE) -> LayerSample:
        """At most `size` of the sampled tokens, with the family's activation and its routing among some experts."""
        step = max(1, len(self.hidden_ND) // size)
        return LayerSample(
            hidden_ND=self.hidden_ND[::step],
            logits_NE=self.logits_NE[::step],
            activate=self._run.activation(self),
            route=self._run.route(self, self.hidden_ND[::step]),
        )

    def finish(self, weights: LayerWeights) -> None:
        """Run the compressed stream through the layer with its new weights."""
        self._run.finish(self, weights)


class SequentialPass(TwoStreams):
    """Streams the original and the compressed model side by side.

    Args:
        original: the model to compress.
        smaller: the same checkpoint with the new config, whose layers are handed over.
        names: statistics to measure behind the compressed layers.
        stored: layers that are finished already.
    """

    def __init__(
        self,
        original: StreamedModel,
        smaller: StreamedModel,
        data: TokenData,
        names: Sequence[str],
        stored: Stored = nothing_stored,
    ) -> None:
        super().__init__(original, data, names, sample_tokens=_SAMPLE_TOKENS)
        self.smaller, self._stored = smaller, stored

    def layers(self) -> Iterator[LoadedLayer | SequentialLayer | ReplayedLayer]:
        """Every layer in order; a MoE layer comes as `SequentialLayer`, and `finish` must be called on it."""
        last = last_open(self._stored, self.original.num_layers)
        for layer in self.walk("compressing"):
            tensors = self._stored(layer.index)
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

    def _routed(
        self, block: nn.Module, numbers: Sequence[int], *, compute: bool
    ) -> Iterator[tuple[int, TokenBatch, RoutedCall]]:
        """What the new router does with the compressed stream's block inputs; experts run only if `compute`."""
        calls: list[RoutedCall] = []
        arch = self.original.arch
        reads: frozenset[Any] = frozenset({"output"}) if compute else frozenset()
        with observe(
            block, router=arch.router, experts=arch.experts, reads=reads, callback=calls.append, compute=compute
        ):
            for number in numbers:
                block(self.inputs[number].to(self.original.device))
                yield number, self.batches[number], calls.pop()

    def _routes(self, layer: SequentialLayer, weights: LayerWeights, numbers: Sequence[int]) -> dict[int, Routes]:
        block = self._block(layer, weights)
        routes = {number: Routes.of(call) for number, _, call in self._routed(block, numbers, compute=False)}
        self.smaller.stock.free_layer(layer.index)
        return routes

    def features(
        self, layer: SequentialLayer, experts: Sequence[WideExpert], weights: LayerWeights, every: int
    ) -> LayerFeatures:
        routes = self._routes(layer, weights, self.some(every))
        return LayerFeatures(self, routes, experts, self.activation(layer), nbytes=self.solver_bytes // 2)

    def member_refit(
        self,
        layer: SequentialLayer,
        experts: Sequence[WideExpert],
        decision: ExpertDecision,
        weights: LayerWeights,
    ) -> tuple[list[WideExpert], dict[str, Any]]:
        """Solve each merged expert's down projection for the weighted mean of its members' outputs (MergeMoE).

        min_W sum over x of ||sum_j b_j W_Dj q_j(x) - W p(x)||^2 + lambda ||W - W0||^2 over the tokens x that the router
        of `weights` sends to the expert, q_j and p the intermediates of member j and of the merged expert, W0 its down
        projection so far; lambda chosen on held-out sequences. An expert that got fewer than `FEW_TOKENS` tokens
        to solve with, or has one member, keeps W0.

        Returns:
            The experts, and facts: relative squared error on held-out tokens over all merged experts before and after,
            and a warning if some had too few tokens.

        Raises:
            StatisticsError: most of the merged experts had too few tokens.
        """
        routes = self._routes(layer, weights, range(len(self.batches)))
        merged = [expert for expert, cluster in enumerate(decision.clusters) if len(cluster) > 1]
        counts = {expert: self._train_count(routes, expert) for expert in merged}
        warning = check_token_counts(
            layer.index, counts, FEW_TOKENS, self.data.num_tokens, user="--refit members", what="merged experts"
        )
        solved = list(experts)
        wanted = before = after = 0.0
        for expert in (expert for expert in merged if counts[expert] >= FEW_TOKENS):
            problem = MemberFeatures(
                self,
                {number: found.unweighted(expert) for number, found in routes.items()},
                experts[expert],
                self.activation(layer),
                members=[stack_experts(layer.weights, (member,)) for member in decision.clusters[expert]],
                shares=decision.weights[expert],
                nbytes=self.solver_bytes // 2,
            )
            solver = JointSolver(problem, experts[expert].down_DW.T, self.bounds)
            refit = solver.finish(solver.search())
            solved[expert] = replace(experts[expert], down_DW=refit.down_ND.T)
            wanted += solver.held_out_energy
            before += refit.search.held_out_before * solver.held_out_energy
            after += refit.search.held_out_after * solver.held_out_energy
        scale = max(wanted, torch.finfo(torch.float64).tiny)
        return solved, {"held_out_before": before / scale, "held_out_after": after / scale, "warning": warning}

    def _train_count(self, routes: Mapping[int, Routes], expert: int) -> int:
        """Tokens to solve with that go to an expert."""
        found = ((self.rows(number, False), routed.tokens[expert]) for number, routed in routes.items())
        return sum(int(rows_T[token_S].sum()) for rows_T, token_S in found if rows_T is not None)

    def activation(self, layer: SequentialLayer) -> Activate:
        """The family's own activation on canonical gate and up pre-activations."""
        moe = self.original.stock.moe_layers[layer.index]
        return family_activation(layer.layer.module.get_submodule(f"{moe.block}.{self.original.arch.experts}"))

    def route(self, layer: SequentialLayer, hidden_ND: Tensor) -> Route:
        """The smaller model's routing of some block inputs when only the given experts are there."""
        ready: list[bool] = []

        def route(_logits_NC: Tensor, kept_C: Tensor) -> tuple[Tensor, Tensor]:
            chosen = layer.weights.select(kept_C)
            if not ready:
                self._block(layer, chosen)
                ready.append(True)
            block = self.smaller.stock.set_router(layer.index, chosen)
            calls: list[RoutedCall] = []
            arch = self.original.arch
            with observe(
                block,
                router=arch.router,
                experts=arch.experts,
                reads=frozenset(),
                callback=calls.append,
                compute=False,
            ):
                block(hidden_ND[None].to(self.smaller.dtype))
            return calls[0].topk_index_TK, calls[0].topk_weight_TK

        return route

    def finish(self, layer: SequentialLayer, weights: LayerWeights) -> None:
        assert layer.layer.native is not None
        self._finish(layer.index, self.original.stock.with_weights(layer.index, layer.layer.native, weights))

    def _finish(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        block = self._filled(index, tensors)
        for number, _, call in self._routed(block, range(len(self.batches)), compute=True):
            assert call.routed_TD is not None
            self.add(number, call.routed_TD)
        self.smaller.stock.free_layer(index)
