"""What `prune-experts` and `merge-experts` make: methods, recipes and targets as the user asked for them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moetools.architectures.base import Architecture, find_architecture
from moetools.arguments import paths
from moetools.errors import UserError
from moetools.formats.reader import open_model
from moetools.forward.calibrate import (
    ModelStatistics,
    check_saving,
    check_statistics,
    collect_statistics,
    load_statistics,
)
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.uneven import EXPERTS_PER_LAYER
from moetools.methods.budget import Budget, expert_mass, spread_budget
from moetools.methods.prune.base import KeepListed, super_experts
from moetools.passes.recipe_checks import check_held_out, scarce_text, tokens_warning
from moetools.passes.recipes import Candidate, candidate_of, candidates_for
from moetools.pipeline.kept import measured_once
from moetools.pipeline.outline import Outline
from moetools.pipeline.records import describe_output, versions
from moetools.pipeline.work import Facts, Outcome
from moetools.plugins import unknown_name
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.reduce.expert_list import Listed, listed_experts
from moetools.verbs.reduce.options import MERGE_METHODS, PRUNE_METHODS, ReduceOptions
from moetools.verbs.reduce.reduced_model import ReducedModel, decision_of
from moetools.verbs.reduce.report import ReduceReport, layer_warnings

Verb = Literal["prune", "merge"]


def resolve_target(
    number: int | None, ratio: float | None, arch: Architecture, config: Mapping[str, Any], argument: str
) -> int:
    """Experts to keep, checked against what the family's router can serve.

    Args:
        number, ratio: experts to keep, or share to remove.
        argument: name of the argument that gives the number.

    Raises:
        UserError: neither or both of number and ratio, a ratio outside (0, 1), or an illegal number of experts.
    """
    if (number is None) == (ratio is None):
        raise UserError(f"give either `{argument}` or `ratio`", hint=f"for example `{argument}=4`, or `ratio=0.5`")
    count = arch.num_experts(config)
    assert count is not None
    target, said = number, f"`{argument}`"
    if ratio is not None:
        if not 0 < ratio < 1:
            raise UserError(f"`ratio={ratio}` is not between 0 and 1", hint="0.5 removes half of the experts")
        target = math.floor(count * (1 - ratio) + 0.5)
        said = f"`ratio={ratio}` of {count} experts:"
        if target == count:
            fewer = [legal for legal in arch.legal_counts(config) if legal < count][-1:]
            hint = f"`ratio={1 - fewer[0] / count:.3g}` removes {count - fewer[0]}" if fewer else "none can be removed"
            raise UserError(f"{said.removesuffix(':')} removes none", hint=hint)
    assert target is not None
    arch.check_expert_count(config, target, option=said)
    return target


class ReduceWork(ReducedModel):
    """One run of `prune-experts` or `merge-experts`, before it is healed.

    Raises:
        UserError: unknown method, illegal target, contradictory or missing options.
        CheckpointError, UnsupportedModelError: the input cannot be handled.
    """

    def __init__(
        self,
        verb: Verb,
        model: Path,
        text: DataOptions,
        forward: ForwardOptions,
        options: ReduceOptions,
        *,
        command: str,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.verb, self.text, self.options, self.command = verb, text, options, command
        experts: Listed | None = getattr(options, "experts", None)
        self.method = options.method or ("explicit" if experts is not None else "reap")
        methods = PRUNE_METHODS if verb == "prune" else MERGE_METHODS
        if self.method.replace("_", "-") not in methods:
            raise unknown_name(f"{verb} method", self.method, list(methods))
        self.listed = listed_experts(self.method, experts)
        if self.listed is None:
            candidates = candidates_for(verb, self.method, options.recipe())
        else:
            candidates = (candidate_of(self.listed.method(), options.recipe()),)
        source = open_model(model)
        argument = "keep" if verb == "prune" else "to"
        listed = None if self.listed is None or options.ratio is not None else self.listed.count
        number = listed if options.target is None else options.target
        target = resolve_target(number, options.ratio, find_architecture(source.config), source.config, argument)
        trained = options.heal and options.heal_train != "router"
        super().__init__(
            source,
            forward,
            progress,
            verb=f"{verb}-experts",
            candidates=candidates,
            target=target,
            seed=seed,
            mtp=options.mtp,
            output_format=options.output_format or ("bf16" if trained else None),
            changes="merging makes new weights" if verb == "merge" else "",
        )
        self.needs = tuple(sorted({name for candidate in candidates for name in candidate.method.needs}))
        self.stock = not (options.allow_uneven or self.stock_problem)
        self.budget: Budget | None = None
        self.warnings: list[str] = []
        self._check_options()
        if self.listed is not None:
            groups = self.arch.num_groups(self.source.config)
            layers = [*self.model.stock.moe_layers, *(module.layer for module in self.mtp_modules)]
            self.listed.check(layers, self.num_experts, self.target, groups)

    @property
    def has_text(self) -> bool:
        return bool(self.text.data)

    def mtp_candidates(self, layer: int) -> tuple[Candidate, ...]:
        if self.listed is None or self.listed.every is not None:
            return super().mtp_candidates(layer)
        if layer not in self.listed.layers:
            raise UserError(f"`experts` lists nothing for layer {layer}")
        # A module is a model of one layer.
        listed = KeepListed(every=None, layers={0: self.listed.layers[layer]})
        return (candidate_of(listed, self.options.recipe()),)

    def _check_options(self) -> None:
        options, has_data = self.options, bool(self.text.data)
        if self.needs and not has_data and options.stats is None:
            raise UserError(
                f"method '{self.method}' measures {', '.join(self.needs)} and needs text",
                hint="`data`, or `stats` from an earlier run",
            )
        if self.needs_streams and not has_data:
            raise UserError(
                f"method '{self.method}' ({self.candidates[0].recipe.describe()}) runs text through every layer",
                hint="`data`",
            )
        if self.sequential and (options.stats is not None or options.save_stats is not None):
            raise UserError(
                "a sequential run measures anew behind every compressed layer and cannot use or save statistics",
                hint="`sequential=False` measures once, on the original",
            )
        if options.allow_uneven:
            self._check_uneven_options(has_data)
        check_saving(options.stats, options.save_stats, has_data=has_data)

    def _check_uneven_options(self, has_data: bool) -> None:
        if self.listed is not None:
            raise UserError("`allow_uneven` spreads a number of experts over the layers, `experts` lists them")
        if self.options.heal:
            raise UserError("`allow_uneven` and `heal` do not go together", hint="heal equal numbers of experts")
        if not has_data and self.options.stats is None:
            raise UserError("`allow_uneven` measures what the experts contribute and needs text", hint="`data`")

    def reads(self) -> Mapping[str, Path]:
        return {**super().reads(), **dict(self.text.paths()), **dict(paths(self.options, "reads"))}

    def writes(self) -> Mapping[str, Path]:
        return dict(paths(self.options, "writes"))

    def load(self) -> None:
        if self.text.data:
            self.data = load_tokens(self.text, self.source, self.model.vocab_size)
            for candidate in self.candidates:
                if candidate.recipe.refit != "none":
                    check_held_out(self.data, f"`refit={candidate.recipe.refit}`")
        if self.options.stats is not None:
            self.statistics = load_statistics(self.options.stats)
            data = self.data.fingerprint if self.data else None
            check_statistics(
                self.statistics,
                model=self.source.fingerprint(),
                needs=self.needs,
                data=data,
                num_experts=self.num_experts,
            )

    def settings(self) -> Mapping[str, Any]:
        saved = self.options.stats
        return {
            "verb": f"{self.verb}-experts",
            **super().settings(),
            "statistics": None if saved is None else hashlib.sha256(saved.read_bytes()).hexdigest(),
            "uneven": self.options.allow_uneven,
            "listed": None if self.listed is None else str(self.listed),
        }

    def prepare(self, scratch: Path) -> None:
        if self.statistics is None and self.data is not None and not self.sequential:
            self.statistics = self._collect(scratch, "statistics")
            if self.options.save_stats is not None and not self.rehearsed:
                self.statistics.save(self.options.save_stats)
        self.warnings = [*self._scarce_text(), *self._token_warnings()]
        self.protected = self._super_experts()
        if self.options.allow_uneven:
            self._spread(self.statistics or self._collect(scratch, "budget"))

    @property
    def measured_before(self) -> Sequence[str]:
        if self.statistics is not None or (self.sequential and not self.options.allow_uneven):
            return ()
        spread = ["reap"] if self.options.allow_uneven else []
        guard = ["max_activation"] if any(candidate.method.guarded for candidate in self.candidates) else []
        return sorted({"load", *spread, *([] if self.sequential else [*self.needs, *guard])})

    def _collect(self, scratch: Path, file: str) -> ModelStatistics:
        """One pass over the original, or what an interrupted run measured in it."""
        assert self.data is not None
        measured = partial(collect_statistics, self.model, self.data, self.measured_before, self.memory_plan)
        return measured_once(scratch / f"{file}.safetensors", measured)

    def _scarce_text(self) -> list[str]:
        if self.data is None:
            return []
        shape, recipes = self.model.layer_shape(1), [candidate.recipe for candidate in self.candidates]
        neurons = any(recipe.combine == "neurons" for recipe in recipes)
        columns = (shape.num_experts if neurons else self.target) * shape.expert_size
        return scarce_text(recipes, self.data.num_tokens, columns=columns, hidden_size=shape.hidden_size)

    def _token_warnings(self) -> list[str]:
        """What calibration lacks for the methods that read statistics of the original; raised where it is too much."""
        if self.statistics is None:
            return []
        one_shot = [candidate for candidate in self.candidates if not candidate.recipe.sequential]
        tokens, layers = self.statistics.provenance.num_tokens, self.statistics.layers.items()
        found = (tokens_warning(one_shot, layer, states, tokens) for layer, states in layers)
        return [warning for warning in found if warning is not None]

    def _super_experts(self) -> dict[int, tuple[int, ...]]:
        """Experts REAP must not drop; known once statistics of the whole original are at hand."""
        guarded, statistics = any(candidate.method.guarded for candidate in self.candidates), self.statistics
        if statistics is None or not guarded or "max_activation" not in statistics.names:
            return {}
        return super_experts(
            {layer: statistics.finalized(layer)["max_activation"]["peak"] for layer in statistics.layers}
        )

    def _spread(self, statistics: ModelStatistics) -> None:
        """Experts per layer by what was measured on the original."""
        found = {layer: expert_mass(statistics.finalized(layer)) for layer in statistics.layers}
        self.budget = self._spread_budget({layer: mass for layer, mass in found.items() if mass is not None})
        if self.budget is None:
            raise UserError("`allow_uneven` has nothing to spread: one expert per layer, or statistics without load")
        self.keep_by_layer = self.budget.experts
        self.forget_output()

    def outline(self) -> Outline | None:
        # How uneven layers come out is measured.
        return None if self.options.allow_uneven else super().outline()

    def new_config(self) -> dict[str, Any]:
        if not self.keep_by_layer:
            return super().new_config()
        most = max(self.keep_by_layer.values())
        config = self.with_experts(most)
        fewer = {str(layer): count for layer, count in self.keep_by_layer.items() if count < most}
        return config | ({EXPERTS_PER_LAYER: fewer} if fewer else {})

    def _spread_budget(self, masses: Mapping[int, tuple[str, Tensor]]) -> Budget | None:
        """How the same number of experts would be spread over the layers; None where nothing was measured."""
        if not masses or self.target == 1:
            return None
        (measure, _), *_ = masses.values()
        least = next(count for count in range(2, self.target + 1) if self._is_legal(count))
        contributions = {layer: mass_E for layer, (_, mass_E) in masses.items()}
        groups = self.arch.num_groups(self.source.config)
        return spread_budget(contributions, measure=measure, keep=self.target, least=least, num_groups=groups)

    def _is_legal(self, count: int) -> bool:
        try:
            self.arch.check_expert_count(self.source.config, count)
        except UserError:
            return False
        return True

    def measured(self) -> Facts:
        statistics = self.statistics
        return {
            "provenance": None if statistics is None else asdict(statistics.provenance),
            "load": load_shares(statistics),
            "warnings": self.warnings,
        }

    def report(self, outcome: Outcome) -> ReduceReport:
        measured = outcome.facts.get(None, {})
        decisions = {index: decision_of(facts) for index, facts in outcome.layers.items()}
        masses = {
            index: (facts["mass"][0], torch.tensor(facts["mass"][1], dtype=torch.float64))
            for index, facts in outcome.layers.items()
            if facts["mass"] is not None
        }
        before = describe_output(self.source)
        planned = before | {"experts": self.target, "bytes": self.expected_bytes()}
        return ReduceReport(
            verb=f"{self.verb}-experts",
            method=self.method,
            command=self.command,
            out=str(outcome.out),
            versions=versions(),
            seed=self.seed,
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            model_type=self.arch.model_type,
            provenance=measured.get("provenance"),
            before=before,
            after=planned if outcome.checkpoint is None else describe_output(outcome.checkpoint),
            layers=decisions,
            load=None if measured.get("load") is None else dict(measured["load"]),
            verified=outcome.verified,
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            memory=outcome.memory,
            dry_run=outcome.dry_run,
            budget=self.budget or self._spread_budget(masses),
            uneven=self.budget is not None,
            **self.precision(outcome),
            mtp=self.mtp_facts(outcome),
            warnings=(*filter(None, [self.mtp.warning]), *measured.get("warnings", ()), *layer_warnings(decisions)),
        )


def load_shares(statistics: ModelStatistics | None) -> list[tuple[int, list[float]]] | None:
    """(layer, share of routed slots per expert), if it was measured."""
    if statistics is None or "load" not in statistics.names:
        return None
    shares = []
    for layer in statistics.layers:
        slots_E = statistics.finalized(layer)["load"]["slots"].sum(0)
        shares.append((layer, (slots_E / slots_E.sum().clamp_min(1)).tolist()))
    return shares
