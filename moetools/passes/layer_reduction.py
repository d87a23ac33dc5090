"""How one MoE layer gets fewer experts: small pieces that combine freely; published methods are settings of them."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.base import Architecture
from moetools.architectures.weights import LayerWeights, WideExpert
from moetools.architectures.weights import stack_experts as _wide
from moetools.errors import StatisticsError
from moetools.forward.calibrate import ModelStatistics, load_statistic
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import announced
from moetools.forward.streaming import LoadedLayer, StreamedModel
from moetools.methods.alignment import align_cluster
from moetools.methods.base import FEW_TOKENS, ExpertDecision, ExpertTarget, combine_experts
from moetools.methods.budget import expert_mass
from moetools.methods.joint_refit import JointSolver
from moetools.methods.neurons import choose_neurons
from moetools.methods.router_fit import cluster_logits, fit_router
from moetools.methods.subspace import combine_in_subspace
from moetools.passes.recipe_checks import tokens_warning
from moetools.passes.recipes import Candidate, Combine, Recipe, Router
from moetools.passes.sequential import SequentialLayer, SequentialPass
from moetools.passes.stored import NOTHING_STORED, ReplayedLayer, Stored
from moetools.passes.token_counts import check_token_counts
from moetools.statistics.base import State
from moetools.text.tokens import TokenData

_SELECTION_EVERY = 1
_TRIAL_EVERY = 2
_TRIAL_ITERATIONS, _TRIAL_SKETCH = 4, 256


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A layer's new experts before a refit.

    Attributes:
        weights: the layer with its new router and the means of the members.
        experts: what a joint refit solves for, not yet refitted; None without one.
    """

    recipe: Recipe
    weights: LayerWeights
    decision: ExpertDecision
    experts: list[WideExpert] | None


@dataclass(frozen=True, kw_only=True)
class ReducedLayer:
    """A decoder layer on its way out.

    Attributes:
        tensors: its fused tensors as a loader will see them.
        native: the original's in the dtype on disk; empty for a replayed layer.
        weights, decision: what becomes of its experts; None for a dense layer and a replayed one.
        mass: what each old expert contributes, and the name of that measure; None where nothing was measured.
        replayed: it was finished before; `tensors` are the stored ones.
    """

    index: int
    tensors: Mapping[str, Tensor]
    native: Mapping[str, Tensor] = field(default_factory=dict)
    weights: LayerWeights | None = None
    decision: ExpertDecision | None = None
    mass: tuple[str, Tensor] | None = None
    replayed: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerReducer:
    """Reduces one layer after the other by a candidate, or by the best of several.

    Attributes:
        keep, num_groups, seed: see `ExpertTarget`.
        keep_by_layer: layers that keep another number of experts.
        statistics: measured on the original; None if no method needs them or all measure behind compressed layers.
        protected: super experts by layer; see `ExpertTarget`.
    """

    candidates: tuple[Candidate, ...]
    arch: Architecture
    keep: int
    num_groups: int
    seed: int
    statistics: ModelStatistics | None
    protected: Mapping[int, tuple[int, ...]]
    keep_by_layer: Mapping[int, int] = field(default_factory=dict)

    def layer_by_layer(
        self, model: StreamedModel, stored: Stored = NOTHING_STORED, *, prefetch: bool = True
    ) -> Iterator[ReducedLayer]:
        """From statistics and weights alone; no text runs through the model."""
        (candidate,) = self.candidates
        with announced(model, "writing") as progress:
            for layer in model.layers(keep_native=True, fill=False, prefetch=prefetch):
                progress.layer(layer.index)
                tensors = stored.get(layer.index)
                if tensors is not None:
                    yield ReducedLayer(index=layer.index, tensors=tensors, replayed=True)
                elif layer.index not in model.stock.moe_layers:
                    yield _unchanged(layer)
                else:
                    progress.phase("solving")
                    yield self._from_statistics(model, layer, candidate)

    def _from_statistics(self, model: StreamedModel, layer: LoadedLayer, candidate: Candidate) -> ReducedLayer:
        weights = model.weights(layer)
        statistics = self._finalized(layer.index, None)
        decision = candidate.method.plan(statistics, self._target(layer.index, weights.num_experts))
        decision = _with_router(decision, candidate.recipe.router)
        if candidate.recipe.align:
            weights = align_cluster(weights, decision)
        new = _combined(weights, decision, candidate.recipe)
        return _reduced(model, layer, new, decision, expert_mass(statistics))

    def stream_by_stream(
        self,
        model: StreamedModel,
        smaller: StreamedModel,
        data: TokenData,
        plan: MemoryPlan,
        stored: Stored = NOTHING_STORED,
    ) -> Iterator[ReducedLayer]:
        """Behind the already compressed layers, towards the original's hidden states."""
        sequential = [candidate for candidate in self.candidates if candidate.recipe.sequential]
        names = sequential_statistics(self.candidates)
        for layer in SequentialPass(model, smaller, data, names, plan, stored).layers():
            if isinstance(layer, ReplayedLayer):
                yield ReducedLayer(index=layer.index, tensors=layer.tensors, replayed=True)
                continue
            if not isinstance(layer, SequentialLayer):
                yield _unchanged(layer)
                continue
            warning = tokens_warning(sequential, layer.index, layer.statistics, data.num_tokens)
            model.progress.phase("solving")
            weights, decision = self._reduced(layer)
            if warning is not None:
                decision = replace(decision, details={**decision.details, "warning": warning})
            model.progress.phase("calibrating")
            layer.finish(weights)
            mass = expert_mass(self._finalized(layer.index, layer.statistics if names else None))
            yield _reduced(model, layer.layer, weights, decision, mass)

    def _target(self, layer: int, num_experts: int) -> ExpertTarget:
        return ExpertTarget(
            num_experts=num_experts,
            keep=self.keep_by_layer.get(layer, self.keep),
            num_groups=self.num_groups,
            layer=layer,
            seed=self.seed,
            protected=self.protected.get(layer, ()),
        )

    def _finalized(self, layer: int, measured: Mapping[str, State] | None) -> Mapping[str, Mapping[str, Tensor]]:
        if measured is not None:
            return {name: load_statistic(name).finalize(dict(state)) for name, state in measured.items()}
        if self.statistics is None:
            return {}
        if layer not in self.statistics.layers:
            raise StatisticsError(f"the statistics have no layer {layer}", hint="measure them again")
        return self.statistics.finalized(layer)

    def _reduced(self, layer: SequentialLayer) -> tuple[LayerWeights, ExpertDecision]:
        """New weights of the layer, and the decision with what was measured about it."""
        if len(self.candidates) == 1:
            return _finished(layer, self._prepared(layer, self.candidates[0]))
        errors: dict[str, float] = {}
        best, least = None, math.inf
        for candidate in self.candidates:
            prepared = self._prepared(layer, candidate)
            errors[candidate.name] = _trial_error(layer, prepared)
            if errors[candidate.name] < least:
                best, least = prepared, errors[candidate.name]
        assert best is not None
        weights, decision = _finished(layer, best)
        chosen = {"candidate": min(errors, key=lambda name: errors[name]), "candidates": errors}
        return weights, replace(decision, details={**decision.details, **chosen})

    def _prepared(self, layer: SequentialLayer, candidate: Candidate) -> "_Prepared":
        """A candidate's new layer, up to the down projections that are solved on text."""
        recipe, method = candidate.recipe, candidate.method
        statistics = self._finalized(layer.index, layer.statistics if recipe.sequential else None)
        target = self._target(layer.index, layer.weights.num_experts)
        sample = layer.sample() if method.needs_sample or recipe.align else None
        if method.needs_sample:
            assert sample is not None
            decision = method.plan_with_sample(statistics, target, layer.weights, sample)
        else:
            decision = method.plan(statistics, target)
        decision = _with_router(decision, recipe.router)
        aligned = layer.weights
        if recipe.align and sample is not None:
            aligned = align_cluster(layer.weights, decision, functools.partial(sample.intermediate, layer.weights))
        weights = _combined(aligned, decision, recipe)
        facts: dict[str, Any] = {}
        if recipe.router == "fitted":
            weights, facts["router_agreement"] = self._fit_router(layer, decision, weights)
        experts = self._experts(layer, decision, weights, recipe.combine) if recipe.refit == "joint" else None
        decision = replace(decision, details={**decision.details, **facts})
        return _Prepared(recipe=recipe, weights=weights, decision=decision, experts=experts)

    def _fit_router(
        self, layer: SequentialLayer, decision: ExpertDecision, weights: LayerWeights
    ) -> tuple[LayerWeights, float | None]:
        old, scoring = layer.weights, self.arch.scoring
        rows_CD, bias_C = fit_router(
            layer.hidden_ND,
            layer.logits_NE,
            decision.clusters,
            rows_ED=old.router_ED.float(),
            bias_E=None if old.router_bias_E is None else old.router_bias_E.float(),
            scoring=scoring,
        )
        bias = None if bias_C is None or old.router_bias_E is None else bias_C.to(old.router_bias_E.dtype)
        fitted = replace(weights, router_ED=rows_CD.to(old.router_ED.dtype), router_bias_E=bias)
        exact_NC = cluster_logits(layer.logits_NE, decision.clusters, scoring)
        return fitted, layer.router_agreement(fitted, exact_NC)

    def _experts(
        self, layer: SequentialLayer, decision: ExpertDecision, weights: LayerWeights, combine: Combine
    ) -> list[WideExpert]:
        if combine != "neurons":
            return [_wide(weights, (expert,)) for expert in range(weights.num_experts)]
        unions = [_wide(layer.weights, cluster) for cluster in decision.clusters]
        problem = layer.features(unions, weights, every=_SELECTION_EVERY)
        chosen = choose_neurons(problem, layer.weights.up_EFD.shape[1], layer.bounds)
        device = layer.weights.up_EFD.device
        return [union.only(neurons.to(device)) for union, neurons in zip(unions, chosen, strict=True)]


def sequential_statistics(candidates: Sequence[Candidate]) -> list[str]:
    """What is measured behind the compressed layers, for those candidates that ask for it."""
    sequential = [candidate for candidate in candidates if candidate.recipe.sequential]
    load = ["load"] if any(candidate.method.min_tokens for candidate in sequential) else []
    return sorted({*load, *(name for candidate in sequential for name in candidate.method.needs)})


def _unchanged(layer: LoadedLayer) -> ReducedLayer:
    assert layer.native is not None
    return ReducedLayer(index=layer.index, tensors=layer.native, native=layer.native)


def _reduced(
    model: StreamedModel,
    layer: LoadedLayer,
    weights: LayerWeights,
    decision: ExpertDecision,
    mass: tuple[str, Tensor] | None,
) -> ReducedLayer:
    assert layer.native is not None
    return ReducedLayer(
        index=layer.index,
        tensors=model.stock.with_weights(layer.index, layer.native, weights),
        native=layer.native,
        weights=weights,
        decision=decision,
        mass=mass,
    )


def _combined(weights: LayerWeights, decision: ExpertDecision, recipe: Recipe) -> LayerWeights:
    """New experts as means of their members; what "neurons" starts from as well."""
    if recipe.combine == "subspace":
        return combine_in_subspace(weights, decision, recipe.rank)
    return combine_experts(weights, decision)


def _with_router(decision: ExpertDecision, router: Router) -> ExpertDecision:
    """The decision with these router rows; fitted rows are computed later, from what the decision's own give."""
    return decision if router == "fitted" else replace(decision, router=router)


def _trial_error(layer: SequentialLayer, prepared: _Prepared) -> float:
    """What the held-out tokens among some of the text lose after a short refit."""
    assert prepared.experts is not None, "every candidate of several is refitted"
    problem = layer.features(prepared.experts, prepared.weights, every=_TRIAL_EVERY)
    bounds = replace(layer.bounds, iterations=_TRIAL_ITERATIONS, sketch=_TRIAL_SKETCH)
    return JointSolver(problem, _stacked_down(prepared.experts), bounds).search().held_out_after


def _finished(layer: SequentialLayer, prepared: _Prepared) -> tuple[LayerWeights, ExpertDecision]:
    """The refit that the recipe asks for."""
    weights, decision, experts = prepared.weights, prepared.decision, prepared.experts
    if prepared.recipe.refit == "none":
        return weights, decision
    if experts is None:
        experts, facts = _solved_for_members(layer, decision, weights)
    else:
        experts, facts = _solved_jointly(layer, experts, weights)
    return _with_experts(weights, experts), replace(decision, details={**decision.details, "refit": facts})


def _solved_jointly(
    layer: SequentialLayer, experts: list[WideExpert], weights: LayerWeights
) -> tuple[list[WideExpert], dict[str, Any]]:
    solver = JointSolver(layer.features(experts, weights), _stacked_down(experts), layer.bounds)
    refit = solver.finish(solver.search())
    pieces = refit.down_ND.split([expert.width for expert in experts])
    solved = [replace(expert, down_DW=piece.T) for expert, piece in zip(experts, pieces, strict=True)]
    return solved, asdict(refit.search)


def _solved_for_members(
    layer: SequentialLayer, decision: ExpertDecision, weights: LayerWeights
) -> tuple[list[WideExpert], dict[str, Any]]:
    """Solve merged experts' down projections for the weighted mean of their members' outputs (MergeMoE).

    min_W sum over x of ||sum_j b_j W_Dj q_j(x) - W p(x)||^2 + lambda ||W - W0||^2 over the tokens x that are routed to
    the expert, q_j and p the (ungated) intermediates of member j and of the merged expert, W0 its down projection so
    far; lambda chosen on held-out sequences. An expert with one member, or with fewer than `FEW_TOKENS` tokens to solve
    with, stays as it is.

    Raises:
        StatisticsError: most of the merged experts had too few tokens.
    """
    routes = layer.routes(weights)
    merged = [expert for expert, cluster in enumerate(decision.clusters) if len(cluster) > 1]
    counts = {expert: layer.train_count(routes, expert) for expert in merged}
    warning = check_token_counts(
        layer.index, counts, FEW_TOKENS, layer.num_tokens, user="`refit=members`", what="merged experts"
    )
    solved = [_wide(weights, (expert,)) for expert in range(weights.num_experts)]
    wanted = before = after = 0.0
    for number in (expert for expert in merged if counts[expert] >= FEW_TOKENS):
        pairs = zip(decision.clusters[number], decision.weights[number], strict=True)
        members = [(_wide(layer.weights, (member,)), share) for member, share in pairs]
        problem = layer.member_features(routes, number, solved[number], members)
        solver = JointSolver(problem, solved[number].down_DW.T, layer.bounds)
        refit = solver.finish(solver.search())
        solved[number] = replace(solved[number], down_DW=refit.down_ND.T)
        wanted += solver.held_out_energy
        before += refit.search.held_out_before * solver.held_out_energy
        after += refit.search.held_out_after * solver.held_out_energy
    scale = max(wanted, torch.finfo(torch.float64).tiny)
    return solved, {"held_out_before": before / scale, "held_out_after": after / scale, "warning": warning}


def _stacked_down(experts: list[WideExpert]) -> Tensor:
    return torch.cat([expert.down_DW.T for expert in experts])


def _with_experts(weights: LayerWeights, experts: list[WideExpert]) -> LayerWeights:
    """The layer with the given experts in place of its own, in its own dtypes."""

    def stacked(name: str, old: Tensor | None) -> Tensor | None:
        return None if old is None else torch.stack([getattr(expert, name) for expert in experts]).to(old.dtype)

    up, down = stacked("up_WD", weights.up_EFD), stacked("down_DW", weights.down_EDF)
    assert up is not None
    assert down is not None
    return replace(
        weights,
        up_EFD=up,
        down_EDF=down,
        gate_EFD=stacked("gate_WD", weights.gate_EFD),
        up_bias_EF=stacked("up_bias_W", weights.up_bias_EF),
        gate_bias_EF=stacked("gate_bias_W", weights.gate_bias_EF),
        down_bias_ED=stacked("down_bias_D", weights.down_bias_ED),
    )
