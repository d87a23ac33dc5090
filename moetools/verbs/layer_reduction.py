"""How one MoE layer gets fewer experts: small pieces that combine freely; published methods are settings of them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moetools.architectures.base import Architecture
from moetools.architectures.weights import LayerWeights
from moetools.errors import StatisticsError, UserError
from moetools.forward.calibrate import ModelStatistics, load_statistic
from moetools.forward.sequential import SequentialLayer, SequentialPass, WideExpert
from moetools.forward.streaming import StreamedModel
from moetools.forward.tokens import TokenData
from moetools.methods.base import ExpertDecision, ExpertMethod, ExpertTarget, combine_experts
from moetools.methods.neurons import choose_neurons
from moetools.methods.refit import RefitResult, refit_down
from moetools.methods.router_fit import fit_router
from moetools.statistics.base import State

Router = Literal["mean", "centroid", "fitted"]
Combine = Literal["average", "neurons"]
Refit = Literal["none", "joint"]

_SELECTION_EVERY = 2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The orthogonal choices beside which experts go together.

    Attributes:
        combine: "average" sums the members' weights; "neurons" keeps those neurons of all members that the layer's
            output needs most (`methods.neurons`).
        router: "mean" or "centroid" rows of the members, or "fitted" to the cluster's exact logit
            (`methods.router_fit`).
        refit: "joint" solves all new down projections together for the original's hidden states (`methods.refit`).
        sequential: statistics are measured behind the already compressed layers instead of once on the original.
    """

    combine: Combine
    router: Router
    refit: Refit
    sequential: bool

    @property
    def needs_streams(self) -> bool:
        """Whether the two-stream pass (`forward.sequential`) is needed at all."""
        return self.sequential or self.refit != "none" or self.router == "fitted" or self.combine == "neurons"

    def describe(self) -> str:
        """The settings as the command line names them."""
        order = "--sequential" if self.sequential else "--one-shot"
        return f"--combine {self.combine} --router {self.router} --refit {self.refit} {order}"

    def check(self) -> None:
        """Refuse combinations that cannot work.

        Raises:
            UserError: neurons without a refit, or an unknown value.
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


def recipe_for(
    method: ExpertMethod,
    *,
    combine: str | None = None,
    router: str | None = None,
    refit: str | None = None,
    sequential: bool | None = None,
) -> Recipe:
    """The method's own settings, with those of the user in their place."""
    chosen = {"combine": combine, "router": router, "refit": refit, "sequential": sequential}
    own = {"combine": method.combine, "router": method.router, "refit": method.refit, "sequential": method.sequential}
    recipe = Recipe(**{name: own[name] if value is None else value for name, value in chosen.items()})  # type: ignore[arg-type]
    recipe.check()
    return recipe


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
    """Reduces one layer after the other by a method and a recipe.

    Attributes:
        top_k: experts per token of the smaller model.
        keep, num_groups, seed: see `ExpertTarget`.
        statistics: measured on the original; None if the method needs none or measures behind compressed layers.
    """

    method: ExpertMethod
    recipe: Recipe
    arch: Architecture
    top_k: int
    keep: int
    num_groups: int
    seed: int
    statistics: ModelStatistics | None

    def layer_by_layer(self, model: StreamedModel) -> Iterator[ReducedLayer]:
        """From statistics and weights alone; no text runs through the model."""
        model.progress.start("writing", layers=model.num_layers, tokens=0)
        try:
            for layer in model.layers(keep_native=True, fill=False):
                model.progress.layer(layer.index)
                assert layer.native is not None
                if layer.index not in model.stock.moe_layers:
                    yield ReducedLayer(index=layer.index, native=layer.native)
                    continue
                weights = model.weights(layer)
                decision = self._decide(layer.index, weights.num_experts, None)
                new = self.method.apply(weights, decision)
                yield ReducedLayer(index=layer.index, native=layer.native, weights=new, decision=decision)
        finally:
            model.progress.stop()

    def stream_by_stream(self, model: StreamedModel, smaller: StreamedModel, data: TokenData) -> Iterator[ReducedLayer]:
        """Behind the already compressed layers, towards the original's hidden states."""
        names = self.method.needs if self.recipe.sequential else ()
        for layer in SequentialPass(model, smaller, data, names).layers():
            if not isinstance(layer, SequentialLayer):
                assert layer.native is not None
                yield ReducedLayer(index=layer.index, native=layer.native)
                continue
            weights, decision = self.reduce(layer)
            layer.finish(weights)
            assert layer.layer.native is not None
            yield ReducedLayer(index=layer.index, native=layer.layer.native, weights=weights, decision=decision)

    def _decide(self, layer: int, num_experts: int, measured: Mapping[str, State] | None) -> ExpertDecision:
        if measured is not None:
            statistics = {name: load_statistic(name).finalize(dict(state)) for name, state in measured.items()}
        elif self.statistics is None:
            statistics = {}
        elif layer in self.statistics.layers:
            statistics = self.statistics.finalized(layer)
        else:
            raise StatisticsError(f"the statistics have no layer {layer}", hint="measure them again")
        target = ExpertTarget(
            num_experts=num_experts, keep=self.keep, num_groups=self.num_groups, layer=layer, seed=self.seed
        )
        decision = self.method.plan(statistics, target)
        if self.recipe.router != "fitted" and self.recipe.router != self.method.router:
            decision = replace(decision, router=self.recipe.router)
        return decision

    def reduce(self, layer: SequentialLayer) -> tuple[LayerWeights, ExpertDecision]:
        """New weights of the layer, and the decision with what was measured about it."""
        measured = layer.statistics if self.recipe.sequential else None
        decision = self._decide(layer.index, layer.weights.num_experts, measured)
        weights = combine_experts(layer.weights, decision)
        facts: dict[str, Any] = {}
        if self.recipe.router == "fitted":
            weights, facts["router_agreement"] = self._fit_router(layer, decision, weights)
        if self.recipe.refit == "joint":
            weights, facts["refit"] = self._refit(layer, decision, weights)
        return weights, replace(decision, details={**decision.details, **facts})

    def _refit(
        self, layer: SequentialLayer, decision: ExpertDecision, weights: LayerWeights
    ) -> tuple[LayerWeights, dict[str, Any]]:
        experts = self._experts(layer, decision, weights)
        train, held_out = layer.normal_equations(experts, weights)
        result = refit_down(train, held_out, torch.cat([expert.down_DW.T for expert in experts]))
        pieces = result.down_ND.split([expert.width for expert in experts])
        experts = [replace(expert, down_DW=piece.T) for expert, piece in zip(experts, pieces, strict=True)]
        return _with_experts(weights, experts), _facts(result)

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

    def _experts(self, layer: SequentialLayer, decision: ExpertDecision, weights: LayerWeights) -> list[WideExpert]:
        if self.recipe.combine == "average":
            return [_wide(weights, (expert,)) for expert in range(weights.num_experts)]
        unions = [_wide(layer.weights, cluster) for cluster in decision.clusters]
        train, held_out = layer.normal_equations(unions, weights, every=_SELECTION_EVERY)
        sizes, quota = [union.width for union in unions], layer.weights.up_EFD.shape[1]
        chosen = choose_neurons(train.plus(held_out), sizes, quota)
        device = layer.weights.up_EFD.device
        return [union.only(neurons.to(device)) for union, neurons in zip(unions, chosen, strict=True)]


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
