"""What the routers do with the tokens of each task: all layers, and their tables."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from moetools.forward.calibrate import ModelStatistics
from moetools.pipeline.table import Table
from moetools.verbs.inspect.advice import Advice, Facts, advice_table, advise
from moetools.verbs.inspect.following import following_table
from moetools.verbs.inspect.layer_routing import (
    MIN_EXPECTED_SLOTS,
    NULL_DRAWS,
    STARVED_SHARE,
    LayerRouting,
    Routing,
    layer_routing,
)
from moetools.verbs.inspect.saturation import Saturation
from moetools.verbs.inspect.serving import serving_table
from moetools.verbs.inspect.shared import shared_table
from moetools.verbs.inspect.similarity import similarity_table
from moetools.verbs.inspect.weights_alike import WeightsAlike
from moetools.verbs.inspect.word_use import Decode, word_table
from moetools.verbs.place.plan import Placement

_PAIRS_SHOWN = 3
_EXPERTS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class EffectiveExperts:
    """exp(entropy of a task's load) of every layer: so many evenly used experts have the same entropy; the median."""

    median: float
    by_layer: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """Routing of every MoE layer.

    Attributes:
        scoring: "sigmoid" where P_e is sigmoid(l_e) / sum sigmoid(l), else "softmax" over all experts.
        chance_lift: (K - 1) E / (K (E - 1)), lift of a pair when K different experts are drawn evenly; 0 for E = 1.
        provenance: what was measured: fingerprints, tasks, dtype, tokens.
        seed: of the null's permutations.
        advice: in words, what is unusual and what would pay.
        saturation: agreement with the routers of another checkpoint, if it was asked for.
        placement: the experts of several devices, if it was asked for.
    """

    model: str
    num_experts: int
    top_k: int
    scoring: str
    chance_lift: float
    provenance: Mapping[str, Any]
    seed: int
    layers: tuple[LayerRouting, ...]
    advice: tuple[Advice, ...] = ()
    saturation: Saturation | None = None
    placement: Placement | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything: all layers, tasks and experts."""
        limits = {
            "starved_share_of_uniform": STARVED_SHARE,
            "min_expected_slots": MIN_EXPECTED_SLOTS,
            "null_permutations": NULL_DRAWS,
        }
        layers = [asdict(layer) for layer in self.layers]
        layers = [{key: value for key, value in plain.items() if value is not None} for plain in layers]
        effective = {task: asdict(found) for task, found in self.effective_experts().items()}
        advice = [asdict(one) for one in self.advice]
        return (
            {"advice": advice}
            | asdict(self)
            | {"advice": advice, "effective_experts": effective, "layers": layers, "limits": limits}
        )

    def tables(self) -> list[Table]:
        """Advice; one row per layer; one per task; most used experts; pairs; other ways to route; a placement."""
        asked = [one.table() for one in (self.saturation, self.placement) if one is not None]
        used = [advice_table(self.advice), self._overview(), *self._by_task(), self._top_experts()]
        return [
            *used,
            *self._pairs(),
            *self._following(),
            *self._shared(),
            *self._words(),
            *self._similarity(),
            self._serving(),
            *asked,
        ]

    def _shared(self) -> Iterator[Table]:
        found = {layer.index: layer.shared for layer in self.layers}
        if any(one.like_shared or one.carried is not None for one in found.values()):
            yield shared_table(found)

    def _following(self) -> Iterator[Table]:
        found = {layer.index: layer.following for layer in self.layers if layer.following is not None}
        if found:
            yield following_table(found)

    def _words(self) -> Iterator[Table]:
        found = {layer.index: layer.words for layer in self.layers if layer.words is not None}
        if found:
            yield word_table(found)

    def _similarity(self) -> Iterator[Table]:
        found = {layer.index: layer.similarity for layer in self.layers if layer.similarity is not None}
        if found:
            yield similarity_table(found)

    def _serving(self) -> Table:
        return serving_table({layer.index: layer.serving for layer in self.layers})

    def _overview(self) -> Table:
        columns = ["layer", "load entropy %", "max/mean", "balance loss", "z-loss", "router entropy"]
        several = self.layers[0].specialization is not None
        columns += ["I(task; expert)", "null 95 %", "p", "mean JS"] if several else []
        rows = [_overview_row(layer) for layer in self.layers]
        note = (
            f"under-used: below {STARVED_SHARE:g} of the uniform share, said from {MIN_EXPECTED_SLOTS} expected slots "
            "per expert on; balance loss with f summing to 1 (balanced: 1)"
        )
        if several:
            note += (
                f"; information and divergence in nats; null: whole sequences dealt out to tasks, {NULL_DRAWS} times"
            )
        tokens = self.provenance["num_tokens"]
        title = f"routing of {self.model}: {tokens:,} tokens, {self.num_experts} experts, top-{self.top_k}"
        return Table(title=title, columns=[*columns, "under-used experts"], rows=rows, note=note)

    def _by_task(self) -> Iterator[Table]:
        """Means over the layers, where there are several tasks to compare."""
        tasks = list(self.layers[0].tasks)
        rows = []
        for task in tasks:
            routings = [layer.tasks[task] for layer in self.layers]
            means = [
                (100 * _mean([routing.entropy_share for routing in routings]), 1),
                (median(routing.effective for routing in routings), 1),
                (_mean([routing.skew for routing in routings]), 2),
                (_mean([routing.balance_loss for routing in routings]), 3),
                (_mean([routing.z_loss for routing in routings]), 3),
                (_mean([routing.router_entropy for routing in routings]), 3),
            ]
            cells = [f"{value:.{digits}f}" for value, digits in means]
            rows.append([task, f"{routings[0].tokens:,}", *cells, _starved(routings)])
        if len(tasks) > 1:
            columns = [
                "task",
                "tokens",
                "load entropy %",
                "effective experts",
                "max/mean",
                "balance loss",
                "z-loss",
                "router entropy",
            ]
            note = "means over the MoE layers, effective experts: median; under-used experts counted over all layers"
            yield Table(title="by task", columns=[*columns, "under-used"], rows=rows, note=note)
            yield self._effective()

    def effective_experts(self) -> dict[str, EffectiveExperts]:
        """Effective number of experts of every task."""
        found = {}
        for task in self.layers[0].tasks:
            by_layer = {layer.index: layer.tasks[task].effective for layer in self.layers}
            found[task] = EffectiveExperts(median=median(by_layer.values()), by_layer=by_layer)
        return found

    def _effective(self) -> Table:
        """Layers x tasks."""
        found = self.effective_experts()
        rows = [
            [str(layer.index), *(f"{one:.1f}" for one in [*tasks, layer.pooled.effective])]
            for layer, *tasks in zip(self.layers, *(one.by_layer.values() for one in found.values()), strict=True)
        ]
        pooled = median(layer.pooled.effective for layer in self.layers)
        rows.append(["median", *(f"{one.median:.1f}" for one in found.values()), f"{pooled:.1f}"])
        note = f"exp(entropy of the load): so many evenly used experts have its entropy; at most {self.num_experts}"
        return Table(title="effective experts", columns=["layer", *found, "all"], rows=rows, note=note)

    def _top_experts(self) -> Table:
        tasks = list(self.layers[0].tasks)
        columns = ["layer", *tasks] + (["all"] if len(tasks) > 1 else [])
        rows = []
        for layer in self.layers:
            routings = [*layer.tasks.values()] + ([layer.pooled] if len(tasks) > 1 else [])
            rows.append([str(layer.index), *(_largest(routing.share) for routing in routings)])
        return Table(title="most used experts", columns=columns, rows=rows, note="expert: % of the task's slots")

    def _pairs(self) -> Iterator[Table]:
        rows = [
            [
                str(layer.index),
                f"{pair.experts[0]} + {pair.experts[1]}",
                f"{pair.share:.1%}",
                f"{pair.second_given_first:.1%}",
                f"{pair.first_given_second:.1%}",
                f"{pair.lift:.2f}",
            ]
            for layer in self.layers
            for pair in layer.pairs[:_PAIRS_SHOWN]
        ]
        if rows:
            columns = ["layer", "i + j", "tokens", "j given i", "i given j", "lift"]
            note = f"lift {self.chance_lift:.2f}: as often as {self.top_k} different experts drawn evenly"
            yield Table(title="experts chosen together", columns=columns, rows=rows, note=note)


def routing_report(
    statistics: ModelStatistics,
    model: str,
    *,
    seed: int = 0,
    groups: int = 1,
    decode: Decode | None = None,
    weights: Mapping[int, WeightsAlike] | None = None,
) -> RoutingReport:
    """The report of statistics that hold those of `inspect_routing`.

    Args:
        groups: of the model's routers.
        decode: text of a token id, if there is a tokenizer.
        weights: how alike the weights of every layer's experts are, if they were compared.
    """
    experts, top_k = statistics.shape.num_experts, statistics.shape.top_k
    alike = weights or {}
    layers = tuple(
        layer_routing(statistics, index, seed, decode, groups, alike.get(index)) for index in statistics.layers
    )
    facts = Facts(
        layers=layers,
        tasks=statistics.provenance.tasks,
        num_experts=experts,
        top_k=top_k,
        groups=groups,
        sequence_loads=[states["sequence_load"] for states in statistics.layers.values()],
        seed=seed,
    )
    return RoutingReport(
        model=model,
        num_experts=experts,
        top_k=top_k,
        scoring=statistics.shape.scoring,
        chance_lift=(top_k - 1) * experts / (top_k * (experts - 1)) if experts > 1 else 0.0,
        provenance=asdict(statistics.provenance),
        seed=seed,
        layers=layers,
        advice=advise(facts),
    )


def _overview_row(layer: LayerRouting) -> list[str]:
    pooled, special = layer.pooled, layer.specialization
    row = [
        str(layer.index),
        f"{100 * pooled.entropy_share:.1f}",
        f"{pooled.skew:.2f}",
        f"{pooled.balance_loss:.3f}",
        f"{pooled.z_loss:.3f}",
        f"{pooled.router_entropy:.3f}",
    ]
    if special is not None:
        row += [f"{special.mutual_information:.4f}", f"{special.null_p95:.4f}", f"{special.p_value:.3f}"]
        row.append(f"{special.mean_js:.4f}")
    if pooled.starved is None:
        return [*row, "not enough tokens"]
    return [*row, " ".join(map(str, pooled.starved)) or "none"]


def _starved(routings: list[Routing]) -> str:
    """Under-used experts of a task in all layers."""
    counts = [len(routing.starved) for routing in routings if routing.starved is not None]
    experts = sum(len(routing.share) for routing in routings)
    return f"{sum(counts)} of {experts}" if counts else "not enough tokens"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _largest(share: list[float]) -> str:
    order = sorted(range(len(share)), key=lambda expert: -share[expert])[:_EXPERTS_SHOWN]
    return "  ".join(f"{expert}: {100 * share[expert]:.0f}" for expert in order)
