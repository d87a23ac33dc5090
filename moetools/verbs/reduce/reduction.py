"""One run that reduces experts: checks first, then statistics, decisions layer by layer, a verified checkpoint."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moetools.architectures.base import Architecture, find_architecture
from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.checkpoint.writer import CheckpointWriter, check_output
from moetools.errors import UserError
from moetools.forward.calibrate import (
    ModelStatistics,
    check_statistics,
    collect_statistics,
    load_statistics,
)
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.forward.uneven import EXPERTS_PER_LAYER, refuse_uneven
from moetools.methods.base import ExpertDecision
from moetools.methods.budget import Budget, expert_mass, spread_budget
from moetools.methods.prune.base import super_experts
from moetools.passes.layer_reduction import LayerReducer, ReducedLayer
from moetools.passes.recipe_checks import (
    check_held_out,
    layer_warnings,
    scarce_text,
    tokens_warning,
)
from moetools.passes.recipes import SETTINGS, candidate_of, candidates_for
from moetools.pipeline.estimate import estimate_seconds
from moetools.pipeline.verification import Intended, probe_batch, tensor_digests, verify_checkpoint
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenData
from moetools.verbs.reduce.expert_list import listed_experts
from moetools.verbs.reduce.report import CompressReport, describe_output, model_card, versions

Verb = Literal["prune", "merge"]


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """What is asked of `prune-experts` and `merge-experts`.

    Attributes:
        method: plug-in name in `moetools.methods.prune` or `moetools.methods.merge`.
        target: experts every layer has afterwards; exactly one of `target` and `ratio` is given.
        ratio: share of experts to remove, 0 < ratio < 1; the number kept is rounded to the nearest legal integer.
        stats: statistics measured before, used instead of a calibration pass.
        save_stats: file to save the measured statistics to.
        overwrite, resume: what to do about an existing output, or an interrupted run.
        dry_run: check everything, report memory, disk and time, write nothing.
        verify: reload the written checkpoint and compare every tensor and the logits of a probe batch.
        seed: for methods that draw at random.
        allow_uneven: spread the number of experts over the layers by what they contribute; the output then loads after
            `import moetools.hf` only.
        experts: experts to keep for method "explicit": "0,2,5" or a JSON file (`verbs.reduce.expert_list`).
        combine, rank, router, refit, sequential, align: in place of the method's own settings
            (`recipes.Recipe`).
        heal: steps of training towards the original's predictions after the reduction; 0 for none.
        heal_train: "router" trains the routers alone, "experts" routers and experts, "all" every parameter.
        heal_data: text to heal on; None takes that of the reduction, beyond its first samples too.
    """

    method: str
    target: int | None = None
    ratio: float | None = None
    stats: Path | None = None
    save_stats: Path | None = None
    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    verify: bool = True
    seed: int = 0
    allow_uneven: bool = False
    experts: str | None = None
    combine: str | None = None
    rank: float | None = None
    router: str | None = None
    refit: str | None = None
    sequential: bool | None = None
    align: bool | None = None
    heal: int = 0
    heal_train: str = "all"
    heal_data: DataOptions | None = None


def resolve_target(options: CompressOptions, arch: Architecture, config: Mapping[str, Any], option: str) -> int:
    """Experts to keep, checked against what the family's router can serve.

    Raises:
        UserError: neither or both of target and ratio, a ratio outside (0, 1), or an illegal number of experts.
    """
    if (options.target is None) == (options.ratio is None):
        raise UserError(f"give either {option} N or --ratio R", hint=f"for example {option} 4, or --ratio 0.5")
    count = arch.num_experts(config)
    assert count is not None
    target = options.target
    if options.ratio is not None:
        if not 0 < options.ratio < 1:
            raise UserError(f"--ratio {options.ratio} is not between 0 and 1", hint="0.5 removes half of the experts")
        target = math.floor(count * (1 - options.ratio) + 0.5)
        option = f"--ratio {options.ratio} of {count} experts:"
    assert target is not None
    arch.check_expert_count(config, target, option=option)
    return target


class Reduction:
    """One run of a verb; every check that needs no weights is made in `__init__`.

    Raises:
        UserError: unknown method, illegal target, unusable output, contradictory or missing options.
        CheckpointError, UnsupportedModelError: the input cannot be handled.
    """

    def __init__(
        self,
        verb: Verb,
        model: Path,
        out: Path,
        data: DataOptions | None,
        forward: ForwardOptions,
        options: CompressOptions,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.started = time.monotonic()
        self.verb, self.out, self.options, self.forward, self.command = verb, Path(out), options, forward, command
        self.listed = listed_experts(options.method, options.experts)
        overrides = {name: getattr(options, name) for name in SETTINGS}
        if self.listed is None:
            self.candidates = candidates_for(verb, options.method, overrides)
        else:
            self.candidates = (candidate_of(self.listed.method(), overrides),)
            if options.target is None and options.ratio is None:
                options = replace(options, target=self.listed.count)
        self.sequential = all(candidate.recipe.sequential for candidate in self.candidates)
        self.needs_streams = any(candidate.needs_streams for candidate in self.candidates)
        self.needs = tuple(sorted({name for candidate in self.candidates for name in candidate.method.needs}))
        self.source: Checkpoint = open_checkpoint(model)
        self.arch = find_architecture(self.source.config)
        refuse_uneven(self.source.config, f"{verb}-experts")
        self.target = resolve_target(options, self.arch, self.source.config, "--keep" if verb == "prune" else "--to")
        self.config = self.arch.with_expert_count(self.source.config, self.target)
        self.keep_by_layer: Mapping[int, int] = {}
        self.data_options = data
        self._check_statistics_options()
        self.old_bytes = self.source.total_bytes
        self.new_bytes = self._expected_bytes()
        check_output(self.out, self.source, options.overwrite, options.resume, self.new_bytes)
        self.model = StreamedModel(self.source, forward, progress=progress)
        self.model.stock.check_names()
        if self.listed is not None:
            count, groups = self.arch.num_experts(self.source.config), self.arch.num_groups(self.source.config)
            self.listed.check(list(self.model.stock.moe_layers), count or 0, self.target, groups)
        self.data = self._load_data()
        for candidate in self.candidates:
            if self.data is not None and candidate.recipe.refit != "none":
                check_held_out(self.data, candidate.recipe.refit)

    def _check_statistics_options(self) -> None:
        options, has_data = self.options, self.data_options is not None and bool(self.data_options.data)
        if self.needs and not has_data and options.stats is None:
            raise UserError(
                f"method '{self.options.method}' measures {', '.join(self.needs)} and needs text",
                hint="--data FILE (or NAME=FILE, repeated), or --stats FILE from an earlier run",
            )
        if self.needs_streams and not has_data:
            raise UserError(
                f"method '{options.method}' ({self.candidates[0].recipe.describe()}) runs text through every layer",
                hint="--data FILE (or NAME=FILE, repeated)",
            )
        if self.sequential and (options.stats is not None or options.save_stats is not None):
            raise UserError(
                "a sequential run measures anew behind every compressed layer and cannot use or save statistics",
                hint="--one-shot measures once, on the original",
            )
        if options.allow_uneven:
            self._check_uneven_options(has_data)
        if options.stats is not None and options.save_stats is not None:
            raise UserError("--stats and --save-stats together: the statistics are saved already")
        if options.save_stats is not None and not has_data:
            raise UserError("--save-stats needs --data to measure something")
        if options.save_stats is not None and not options.save_stats.absolute().parent.is_dir():
            raise UserError(f"--save-stats: the folder '{options.save_stats.absolute().parent}' does not exist")

    def _check_uneven_options(self, has_data: bool) -> None:
        if self.listed is not None:
            raise UserError("--allow-uneven spreads a number of experts over the layers, --experts lists them")
        if self.options.heal:
            raise UserError("--allow-uneven and --heal do not go together", hint="heal equal numbers of experts")
        if not has_data and self.options.stats is None:
            raise UserError("--allow-uneven measures what the experts contribute and needs text", hint="--data FILE")

    def _expected_bytes(self) -> int:
        count = self.arch.num_experts(self.source.config)
        assert count is not None
        tensors = self.source.tensors.items()
        experts = sum(info.nbytes for name, info in tensors if self.arch.part_of(name) == "experts")
        return self.old_bytes - experts + experts * self.target // count

    def _load_data(self) -> TokenData | None:
        if self.data_options is None or not self.data_options.data:
            return None
        return load_tokens(self.data_options, self.source, self.model.vocab_size)

    def run(self) -> CompressReport:
        memory = self.model.memory_plan(self.data.batches if self.data else [], keep_native=True)
        memory.check()
        if self.options.dry_run:
            return self._dry_report(memory)
        saved = self._saved_statistics()
        with CheckpointWriter(
            self.out,
            source=self.source,
            plan=self._plan(saved),
            expected_bytes=self.new_bytes,
            overwrite=self.options.overwrite,
            resume=self.options.resume,
        ) as writer:
            statistics = saved or self._measure(writer)
            warnings = [*self._scarce_text(), *self._token_warnings(statistics)]
            uneven = self._spread(writer, statistics) if self.options.allow_uneven else None
            measured = time.monotonic()
            decisions, masses, intended = self._write(writer, statistics)
            contents = writer.assemble()
            written = time.monotonic()
            if self.options.verify:
                verify_checkpoint(contents, self.forward, intended, source=self.source, progress=self.model.progress)
            report = CompressReport(
                verb=f"{self.verb}-experts",
                method=self.options.method,
                command=self.command,
                out=str(self.out),
                versions=versions(),
                seed=self.options.seed,
                input_path=str(self.source.path),
                input_fingerprint=self.source.fingerprint(),
                provenance=asdict(statistics.provenance) if statistics else None,
                before=describe_output(self.source),
                after=describe_output(open_checkpoint(contents)),
                layers=decisions,
                load=self._load_shares(statistics),
                verified=self.options.verify,
                seconds={
                    "calibrate": round(measured - self.started, 3),
                    "write": round(written - measured, 3),
                    "verify": round(time.monotonic() - written, 3),
                },
                memory=memory,
                budget=uneven or self._budget(masses),
                uneven=uneven is not None,
                warnings=(*warnings, *layer_warnings(decisions)),
            )
            writer.write_json("moetools.json", report.to_json())
            writer.write_text("README.md", model_card(report, self.arch.model_type))
            writer.commit()
        return report

    def _plan(self, saved: ModelStatistics | None) -> dict[str, Any]:
        """Settings that determine every byte of the output, so that only the same run is ever resumed."""
        measured_on = asdict(saved.provenance) if saved else None
        return {
            "verb": self.verb,
            "method": self.options.method,
            "experts": self.target,
            "seed": self.options.seed,
            "model": self.source.fingerprint(),
            "statistics": measured_on,
            "data": self.data.fingerprint if self.data else None,
            "dtype": str(self.model.dtype),
            "recipes": [asdict(candidate.recipe) for candidate in self.candidates],
            "uneven": self.options.allow_uneven,
            "listed": None if self.listed is None else str(self.listed),
        }

    def _saved_statistics(self) -> ModelStatistics | None:
        if self.options.stats is None:
            return None
        saved = load_statistics(self.options.stats)
        check_statistics(
            saved,
            model=self.source.fingerprint(),
            needs=self.needs,
            data=self.data.fingerprint if self.data else None,
        )
        return saved

    def _measure(self, writer: CheckpointWriter) -> ModelStatistics | None:
        """Calibrate, or take up what an interrupted run had measured; kept beside the staged layers for a resume."""
        if self.data is None or self.sequential:
            return None
        guard = ["max_activation"] if any(candidate.method.guarded for candidate in self.candidates) else []
        statistics = self._collect(writer, "statistics", [*self.needs, *guard])
        if self.options.save_stats is not None:
            statistics.save(self.options.save_stats)
        return statistics

    def _collect(self, writer: CheckpointWriter, file: str, names: Sequence[str]) -> ModelStatistics:
        """One pass over the original, or what an interrupted run measured in it."""
        assert self.data is not None
        kept = writer.scratch / f"{file}.safetensors"
        if kept.exists():
            return load_statistics(kept)
        spread = ["reap"] if self.options.allow_uneven else []
        statistics = collect_statistics(self.model, self.data, sorted({"load", *names, *spread}))
        statistics.save(kept)
        return statistics

    def _scarce_text(self) -> list[str]:
        if self.data is None:
            return []
        shape, recipes = self.model.layer_shape(1), [candidate.recipe for candidate in self.candidates]
        neurons = any(recipe.combine == "neurons" for recipe in recipes)
        columns = (shape.num_experts if neurons else self.target) * shape.expert_size
        return scarce_text(recipes, self.data.num_tokens, columns=columns, hidden_size=shape.hidden_size)

    def _token_warnings(self, statistics: ModelStatistics | None) -> list[str]:
        """What calibration lacks for the methods that read statistics of the original; raised where it is too much."""
        if statistics is None:
            return []
        one_shot = [candidate for candidate in self.candidates if not candidate.recipe.sequential]
        tokens = statistics.provenance.num_tokens
        found = (tokens_warning(one_shot, layer, states, tokens) for layer, states in statistics.layers.items())
        return [warning for warning in found if warning is not None]

    def _spread(self, writer: CheckpointWriter, statistics: ModelStatistics | None) -> Budget | None:
        """Experts per layer by what was measured on the original; sets what config.json says of them."""
        if statistics is None:
            statistics = self._collect(writer, "budget", [])
        found = {layer: expert_mass(statistics.finalized(layer)) for layer in statistics.layers}
        budget = self._budget({layer: mass for layer, mass in found.items() if mass is not None})
        if budget is None:
            raise UserError("--allow-uneven has nothing to spread: one expert per layer, or statistics without load")
        self.keep_by_layer = budget.experts
        most = max(budget.experts.values())
        fewer = {str(layer): count for layer, count in budget.experts.items() if count < most}
        self.config = self.arch.with_expert_count(self.source.config, most)
        if fewer:
            self.config[EXPERTS_PER_LAYER] = fewer
        return budget

    def _budget(self, masses: Mapping[int, tuple[str, Tensor]]) -> Budget | None:
        """How the same number of experts would be spread over the layers; None where nothing was measured."""
        if not masses or self.target == 1:
            return None
        (measure, _), *_ = masses.values()
        least = next(count for count in range(2, self.target + 1) if self._is_legal(count))
        contributions = {layer: mass_E for layer, (_, mass_E) in masses.items()}
        groups = self.arch.num_groups(self.config)
        return spread_budget(contributions, measure=measure, keep=self.target, least=least, num_groups=groups)

    def _is_legal(self, count: int) -> bool:
        try:
            self.arch.check_expert_count(self.source.config, count)
        except UserError:
            return False
        return True

    def _write(
        self, writer: CheckpointWriter, statistics: ModelStatistics | None
    ) -> tuple[dict[int, ExpertDecision], dict[int, tuple[str, Tensor]], Intended]:
        """All units, and what was meant by them: digests of every fused tensor and the logits of a probe batch.

        Also what each expert contributed, by layer.
        """
        smaller = StreamedModel(self.source, self.forward, config=self.config)
        batch = smaller.on_device(probe_batch(self.data, smaller.vocab_size))
        decisions: dict[int, ExpertDecision] = {}
        masses: dict[int, tuple[str, Tensor]] = {}
        digests: dict[int, dict[str, str]] = {}
        self._write_rest(writer)
        with torch.inference_mode():
            hidden = smaller.skeleton.enter(batch)[0]
            for layer in self._reduced_layers(smaller, statistics):
                tensors, on_disk = layer.tensors, None
                if layer.weights is not None:
                    assert layer.decision is not None
                    on_disk = self.model.stock.disk_tensors(layer.index, layer.native, layer.weights)
                    decisions[layer.index] = layer.decision
                    masses |= {layer.index: layer.mass} if layer.mass is not None else {}
                digests[layer.index] = tensor_digests(tensors)
                unit = f"layer-{layer.index:05d}"
                if unit not in writer.finished:
                    writer.write_unit(unit, on_disk or self.source.read(self.model.stock.names[layer.index]))
                hidden = smaller.run_tensors(layer.index, tensors, batch, hidden)
            logits = smaller.skeleton.logits(batch, hidden)
        return decisions, masses, Intended(digests=digests, batch=batch, logits=logits)

    def _reduced_layers(self, smaller: StreamedModel, statistics: ModelStatistics | None) -> Iterator[ReducedLayer]:
        reducer = LayerReducer(
            candidates=self.candidates,
            arch=self.arch,
            top_k=self.arch.top_k(self.config) or 1,
            keep=self.target,
            num_groups=self.arch.num_groups(self.config),
            seed=self.options.seed,
            statistics=statistics,
            protected=self._super_experts(statistics),
            keep_by_layer=self.keep_by_layer,
        )
        if not self.needs_streams:
            return reducer.layer_by_layer(self.model)
        assert self.data is not None
        return reducer.stream_by_stream(self.model, smaller, self.data)

    def _write_rest(self, writer: CheckpointWriter) -> None:
        stock = self.model.stock
        if "rest" not in writer.finished:
            writer.write_unit("rest", self.source.read([*stock.names[None], *stock.extra_names]))
        writer.carry_sidecars()
        writer.write_json("config.json", self.config)

    def _super_experts(self, statistics: ModelStatistics | None) -> dict[int, tuple[int, ...]]:
        """Experts REAP must not drop; known once statistics of the whole original are at hand."""
        guarded = any(candidate.method.guarded for candidate in self.candidates)
        if statistics is None or not guarded or "max_activation" not in statistics.names:
            return {}
        return super_experts(
            {layer: statistics.finalized(layer)["max_activation"]["peak"] for layer in statistics.layers}
        )

    def _load_shares(self, statistics: ModelStatistics | None) -> dict[int, list[float]] | None:
        if statistics is None or "load" not in statistics.names:
            return None
        shares: dict[int, list[float]] = {}
        for layer in statistics.layers:
            slots_E = statistics.finalized(layer)["load"]["slots"].sum(0)
            shares[layer] = (slots_E / slots_E.sum().clamp_min(1)).tolist()
        return shares

    def _dry_report(self, memory: MemoryPlan) -> CompressReport:
        tokens = self.data.num_tokens if self.data else 0
        estimate = estimate_seconds(self.model, tokens, read_bytes=2 * self.old_bytes, written_bytes=self.new_bytes)
        before = describe_output(self.source)
        return CompressReport(
            verb=f"{self.verb}-experts",
            method=self.options.method,
            command=self.command,
            out=str(self.out),
            versions=versions(),
            seed=self.options.seed,
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            provenance=None,
            before=before,
            after=before | {"experts": self.target, "bytes": self.new_bytes},
            layers={},
            load=None,
            verified=False,
            seconds={"expected": round(estimate, 1)},
            memory=memory,
            dry_run=True,
        )
