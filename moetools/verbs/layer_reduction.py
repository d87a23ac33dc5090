"""How one MoE layer gets fewer experts: small pieces that combine freely; published methods are settings of them."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moetools.architectures.base import Architecture
from moetools.architectures.weights import LayerWeights
from moetools.errors import StatisticsError, UserError
from moetools.forward.calibrate import ModelStatistics, load_statistic
from moetools.forward.streaming import StreamedModel
from moetools.forward.tokens import TokenData
from moetools.methods.alignment import align_cluster
from moetools.methods.base import ExpertDecision, ExpertMethod, ExpertTarget, combine_experts
from moetools.methods.neurons import choose_neurons
from moetools.methods.refit import RefitResult, refit_down
from moetools.methods.router_fit import fit_router
from moetools.plugins import load_plugin
from moetools.sizes import format_bytes
from moetools.statistics.base import State
from moetools.verbs.sequential import SequentialLayer, SequentialPass, WideExpert

Router = Literal["mean", "centroid", "fitted"]
Combine = Literal["average", "neurons"]
Refit = Literal["none", "joint", "blocked"]

_SELECTION_EVERY = 2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The orthogonal choices beside which experts go together.

    Attributes:
        combine: "average" sums the members' weights; "neurons" keeps those neurons of all members that the layer's
            output needs most (`methods.neurons`).
        router: "mean" or "centroid" rows of the members, or "fitted" to the cluster's exact logit
            (`methods.router_fit`).
        refit: "joint" solves all new down projections together for the original's hidden states (`methods.refit`),
            "blocked" one after the other, for layers whose neurons are too many to be solved together.
        sequential: statistics are measured behind the already compressed layers instead of once on the original.
        align: put the members' neurons in the centroid's order before they are averaged (`methods.alignment`).
    """

    combine: Combine
    router: Router
    refit: Refit
    sequential: bool
    align: bool

    @property
    def needs_streams(self) -> bool:
        """Whether the two-stream pass (`verbs.sequential`) is needed at all."""
        return self.sequential or self.refit != "none" or self.router == "fitted" or self.combine == "neurons"

    def describe(self) -> str:
        """The settings as the command line names them."""
        order = "--sequential" if self.sequential else "--one-shot"
        align = "--align" if self.align else "--no-align"
        return f"--combine {self.combine} {align} --router {self.router} --refit {self.refit} {order}"

    def check(self) -> None:
        """Refuse combinations that cannot work.

        Raises:
            UserError: neurons without a joint refit, or an unknown value.
        """
        for option, value, kind in (
            ("--combine", self.combine, Combine),
            ("--router", self.router, Router),
            ("--refit", self.refit, Refit),
        ):
            if value not in get_args(kind):
                raise UserError(f"{option} '{value}' is unknown; legal: {', '.join(get_args(kind))}")
        if self.combine == "neurons" and self.refit != "joint":
            raise UserError("--combine neurons keeps parts of several experts and needs --refit joint")


def recipe_for(method: ExpertMethod, overrides: Mapping[str, str | bool | None]) -> Recipe:
    """The method's own settings, with those of the user (where not None) in their place."""
    own = {name: getattr(method, name) for name in ("combine", "router", "refit", "sequential", "align")}
    recipe = Recipe(**own | {name: value for name, value in overrides.items() if value is not None})
    recipe.check()
    return recipe


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with a recipe; `auto` tries several for each layer."""

    name: str
    method: ExpertMethod
    recipe: Recipe

    @property
    def needs_streams(self) -> bool:
        return self.recipe.needs_streams or self.method.needs_sample


_REFIT: dict[str, str | bool] = {"refit": "joint", "sequential": True}
_PRUNING = tuple(("prune", name, _REFIT) for name in ("reap", "frequency", "gate-mass", "naee"))
AUTO: dict[str, tuple[tuple[str, str, dict[str, str | bool]], ...]] = {
    "prune": _PRUNING,
    "merge": (("merge", "joint", {}), ("merge", "joint", {"router": "centroid"}), *_PRUNING),
}
"""What `--method auto` tries: package, method, and its settings."""


def candidates_for(verb: str, method: str, overrides: Mapping[str, str | bool | None]) -> tuple[Candidate, ...]:
    """The one candidate a method names, or those `auto` chooses from.

    Raises:
        UserError: unknown method, or settings that do not go together.
    """
    if method != "auto":
        found: ExpertMethod = load_plugin(f"moetools.methods.{verb}", method, kind=f"{verb} method").METHOD
        return (Candidate(name=method, method=found, recipe=recipe_for(found, overrides)),)
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if chosen:
        raise UserError("--method auto chooses the recipe itself", hint="name a method to set " + ", ".join(chosen))
    found_all = []
    for package, name, settings in AUTO[verb]:
        plugin: ExpertMethod = load_plugin(f"moetools.methods.{package}", name, kind="method").METHOD
        label = " ".join([name, *(f"{key}={value}" for key, value in settings.items() if key == "router")])
        found_all.append(Candidate(name=label, method=plugin, recipe=recipe_for(plugin, settings)))
    return tuple(found_all)


@dataclass(frozen=True, kw_only=True)
class ReducedLayer:
    """A decoder layer on its way out.

    Attributes:
        native: the original's fused tensors in the dtype on disk.
        weights, decision: what becomes of its experts; None for a dense layer.
    """

    index: int
    native: Mapping[str, Tensor]
    weights: LayerWeights | None = None
    decision: ExpertDecision | None = None


@dataclass(frozen=True, kw_only=True)
class LayerReducer:
    """Reduces one layer after the other by a candidate, or by the best of several.

    Attributes:
        top_k: experts per token of the smaller model.
        keep, num_groups, seed: see `ExpertTarget`.
        statistics: measured on the original; None if no method needs them or all measure behind compressed layers.
        protected: super experts by layer; see `ExpertTarget`.
    """

    candidates: tuple[Candidate, ...]
    arch: Architecture
    top_k: int
    keep: int
    num_groups: int
    seed: int
    statistics: ModelStatistics | None
    protected: Mapping[int, tuple[int, ...]]

    def layer_by_layer(self, model: StreamedModel) -> Iterator[ReducedLayer]:
        """From statistics and weights alone; no text runs through the model."""
        (candidate,) = self.candidates
        model.progress.start("writing", layers=model.num_layers, tokens=0)
        try:
            for layer in model.layers(keep_native=True, fill=False):
                model.progress.layer(layer.index)
                assert layer.native is not None
                if layer.index not in model.stock.moe_layers:
                    yield ReducedLayer(index=layer.index, native=layer.native)
                    continue
                weights = model.weights(layer)
                target = self._target(layer.index, weights.num_experts)
                decision = candidate.method.plan(self._finalized(layer.index, None), target)
                decision = _with_router(decision, candidate.recipe.router)
                if candidate.recipe.align:
                    weights = align_cluster(weights, decision)
                new = candidate.method.apply(weights, decision)
                yield ReducedLayer(index=layer.index, native=layer.native, weights=new, decision=decision)
        finally:
            model.progress.stop()

    def stream_by_stream(self, model: StreamedModel, smaller: StreamedModel, data: TokenData) -> Iterator[ReducedLayer]:
        """Behind the already compressed layers, towards the original's hidden states."""
        sequential = [candidate for candidate in self.candidates if candidate.recipe.sequential]
        names = sorted({name for candidate in sequential for name in candidate.method.needs})
        for layer in SequentialPass(model, smaller, data, names).layers():
            if not isinstance(layer, SequentialLayer):
                assert layer.native is not None
                yield ReducedLayer(index=layer.index, native=layer.native)
                continue
            results = [self.reduce(layer, candidate) for candidate in self.candidates]
            weights, decision = min(results, key=_held_out_error) if len(results) > 1 else results[0]
            if len(results) > 1:
                errors = {c.name: _held_out_error(r) for c, r in zip(self.candidates, results, strict=True)}
                decision = replace(decision, details={**decision.details, "candidates": errors})
            layer.finish(weights)
            assert layer.layer.native is not None
            yield ReducedLayer(index=layer.index, native=layer.layer.native, weights=weights, decision=decision)

    def _target(self, layer: int, num_experts: int) -> ExpertTarget:
        return ExpertTarget(
            num_experts=num_experts,
            keep=self.keep,
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

    def reduce(self, layer: SequentialLayer, candidate: Candidate) -> tuple[LayerWeights, ExpertDecision]:
        """New weights of the layer, and the decision with what was measured about it."""
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
        weights = combine_experts(aligned, decision)
        facts: dict[str, Any] = {}
        if recipe.router == "fitted":
            weights, facts["router_agreement"] = self._fit_router(layer, decision, weights)
        if recipe.refit != "none":
            experts = self._experts(layer, decision, weights, recipe.combine)
            solve = _solve_jointly if recipe.refit == "joint" else SequentialLayer.refit_one_by_one
            experts, facts["refit"] = solve(layer, experts, weights)
            weights = _with_experts(weights, experts)
        return weights, replace(decision, details={**decision.details, **facts})

    def _fit_router(
        self, layer: SequentialLayer, decision: ExpertDecision, weights: LayerWeights
    ) -> tuple[LayerWeights, float]:
        old = layer.weights
        fitted = fit_router(
            layer.hidden_ND,
            layer.logits_NE,
            decision.clusters,
            rows_ED=old.router_ED.float(),
            bias_E=None if old.router_bias_E is None else old.router_bias_E.float(),
            scoring=self.arch.scoring,
            top_k=self.top_k,
        )
        rows = fitted.rows_ED.to(old.router_ED.dtype)
        bias = None if fitted.bias_E is None or old.router_bias_E is None else fitted.bias_E.to(old.router_bias_E.dtype)
        return replace(weights, router_ED=rows, router_bias_E=bias), fitted.agreement

    def _experts(
        self, layer: SequentialLayer, decision: ExpertDecision, weights: LayerWeights, combine: Combine
    ) -> list[WideExpert]:
        if combine == "average":
            return [_wide(weights, (expert,)) for expert in range(weights.num_experts)]
        unions = [_wide(layer.weights, cluster) for cluster in decision.clusters]
        train, held_out = layer.normal_equations(unions, weights, every=_SELECTION_EVERY)
        sizes, quota = [union.width for union in unions], layer.weights.up_EFD.shape[1]
        chosen = choose_neurons(train.plus(held_out), sizes, quota)
        device = layer.weights.up_EFD.device
        return [union.only(neurons.to(device)) for union, neurons in zip(unions, chosen, strict=True)]


def check_gram_memory(columns: int, budget: int, combine: Combine) -> None:
    """Refuse a joint refit of `columns` neurons whose normal equations do not fit the memory budget.

    Two Grams in fp32 (training and held-out tokens) and two in fp64 while they are solved: 24 * columns^2 bytes.

    Raises:
        UserError: with both numbers.
    """
    needed = 24 * columns**2
    if needed > budget:
        what = "all members' neurons" if combine == "neurons" else "the new experts' neurons"
        raise UserError(
            f"the joint refit solves for {columns:,} neurons of a layer together ({what}), which needs "
            f"{format_bytes(needed)} of {format_bytes(budget)}",
            hint="--combine average --refit blocked needs memory for one expert at a time",
        )


def _with_router(decision: ExpertDecision, router: Router) -> ExpertDecision:
    """The decision with these router rows; fitted rows are computed later, from what the decision's own give."""
    return decision if router == "fitted" else replace(decision, router=router)


def _held_out_error(result: tuple[LayerWeights, ExpertDecision]) -> float:
    """Relative squared error on held-out tokens that a refit reported."""
    refit = result[1].details["refit"]
    assert isinstance(refit, Mapping)
    return refit["held_out_after"]


def _solve_jointly(
    layer: SequentialLayer, experts: list[WideExpert], weights: LayerWeights
) -> tuple[list[WideExpert], dict[str, Any]]:
    train, held_out = layer.normal_equations(experts, weights)
    result = refit_down(train, held_out, torch.cat([expert.down_DW.T for expert in experts]))
    pieces = result.down_ND.split([expert.width for expert in experts])
    solved = [replace(expert, down_DW=piece.T) for expert, piece in zip(experts, pieces, strict=True)]
    return solved, _facts(result)


def _facts(result: RefitResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if key != "down_ND"}


def _wide(weights: LayerWeights, members: tuple[int, ...]) -> WideExpert:
    """All neurons of some experts side by side, in fp32; the down bias is the members' mean."""

    def stacked(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor[expert] for expert in members]).float()

    up = stacked(weights.up_EFD)
    assert up is not None
    bias = weights.down_bias_ED
    return WideExpert(
        up_WD=up,
        down_DW=torch.cat([weights.down_EDF[expert] for expert in members], 1).float(),
        gate_WD=stacked(weights.gate_EFD),
        up_bias_W=stacked(weights.up_bias_EF),
        gate_bias_W=stacked(weights.gate_bias_EF),
        down_bias_D=None if bias is None else torch.stack([bias[expert] for expert in members]).float().mean(0),
    )


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
