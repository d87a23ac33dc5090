"""A checkpoint with fewer experts in every MoE layer: what each layer becomes, whatever chose the experts."""

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from moetools.architectures.base import find_architecture
from moetools.architectures.mtp import MtpTensors, find_mtp
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import MoetoolsError
from moetools.formats.kept import carry_quantization_files, kept_config, stock_problem
from moetools.formats.precision import compare_precision
from moetools.formats.reader import precision_note
from moetools.forward.calibrate import ModelStatistics, calibration_plan
from moetools.forward.memory import MemoryPlan
from moetools.forward.mtp import MtpModule, TrunkStates, TrunkStream, find_modules, run_trunk
from moetools.forward.options import ForwardOptions
from moetools.forward.packed_layer import packed_layer
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.forward.uneven import refuse_uneven
from moetools.methods.base import ExpertDecision
from moetools.passes.layer_reduction import LayerReducer, ReducedLayer, sequential_statistics
from moetools.passes.mtp_reduction import MtpReducer, ReducedModule, Trunks
from moetools.passes.recipe_checks import solver_bytes
from moetools.passes.recipes import Candidate
from moetools.passes.sequential import ROUTER_TOKENS
from moetools.passes.two_streams import streams_plan
from moetools.pipeline.estimate import Rehearsal
from moetools.pipeline.finished import FinishedUnits
from moetools.pipeline.outline import Outline, reduced_outline
from moetools.pipeline.work import Facts, Outcome, Unit, Work, never, whole_rest
from moetools.verbs.reduce.mtp_fate import decide_mtp
from moetools.verbs.reduce.packing import keeps_packed, refit_words
from moetools.verbs.reduce.report import ReduceReport

_LOG = logging.getLogger(__name__)


class ReducedModel(Work[ReduceReport]):
    """Fewer experts in every MoE layer.

    Args:
        verb: for messages.
        candidates: methods with their recipes; the best of several is taken for each layer.
        target: experts that every layer keeps.
        seed: for methods that draw at random.
        mtp: what becomes of multi-token-prediction layers; see `decide_mtp`.
        output_format, changes: see `keeps_packed`; a refit changes weights in any case.

    Attributes:
        packed: the input, if its packed tensors stay as they are; None where they are decoded, and for a plain input.
        statistics: measured on the original; None where methods need none or measure behind compressed layers.
        keep_by_layer: layers that keep another number of experts.
        mtp: what becomes of multi-token-prediction layers.

    Raises:
        CheckpointError, UnsupportedModelError: the input cannot be handled.
    """

    def __init__(
        self,
        source: Checkpoint,
        forward: ForwardOptions,
        progress: Progress | None,
        *,
        verb: str,
        candidates: Sequence[Candidate],
        target: int,
        seed: int,
        mtp: str | None = None,
        output_format: str | None = None,
        changes: str = "",
    ) -> None:
        self.source, self.forward = source, forward
        self.arch = find_architecture(self.source.config)
        refuse_uneven(self.source.config, verb)
        self.candidates, self.target, self.seed = tuple(candidates), target, seed
        self.sequential = all(candidate.recipe.sequential for candidate in candidates)
        self.needs_streams = any(candidate.needs_streams for candidate in candidates)
        self.statistics: ModelStatistics | None = None
        self.keep_by_layer: Mapping[int, int] = {}
        self.mtp_modules: Sequence[MtpModule] = ()
        self.protected: Mapping[int, tuple[int, ...]] = {}
        refits = [refit_words(one.recipe.refit) for one in candidates if one.recipe.refit != "none"]
        changes = changes or "".join(refits[:1])
        self.packed = keeps_packed(source, output_format, changes=changes, experts=self.num_experts)
        self.stock_problem = "" if self.packed is None else stock_problem(self.packed, self.arch)
        self._kept: dict[int, list[int]] = {}
        self.model = StreamedModel(self.source, forward, progress=progress)
        self.model.stock.check_names()
        tensors = find_mtp(self.model.stock.extra_names, source.tensors, self.arch, source.config)
        self.mtp = decide_mtp(mtp, tensors, before=self.num_experts, experts=target, obstacle=self._mtp_obstacle)
        if self.mtp.mode != "follow":
            self.mtp_modules = ()
        if self.mtp.warning:
            _LOG.warning("%s", self.mtp.warning)

    def _mtp_obstacle(self, tensors: MtpTensors) -> str:
        """Why the MTP layers cannot be reduced as well; empty where they can, and `mtp_modules` are known."""
        try:
            self.mtp_modules = find_modules(self.model, tensors)
            reducers = [self.mtp_reducer(module, self.target) for module in self.mtp_modules]
            for reducer in reducers:
                reducer.models()[0].stock.check_names()
        except MoetoolsError as error:
            return error.message
        if not self.has_text and any(reducer.needs_text for reducer in reducers):
            return "their experts are measured on text, which statistics of the other layers do not replace"
        return ""

    def mtp_reducer(self, module: MtpModule, experts: int) -> MtpReducer:
        """What leaves so many experts of a module."""
        return MtpReducer(
            module=module,
            candidates=self.mtp_candidates(module.layer),
            experts=experts,
            seed=self.seed,
            forward=self.forward,
            progress=self.model.progress,
            packed=self.packed,
        )

    def mtp_candidates(self, layer: int) -> tuple[Candidate, ...]:  # noqa: ARG002 - for those that list experts by layer
        """What chooses the experts of an MTP layer: what chooses those of all others.

        Raises:
            UserError: nothing does.
        """
        return self.candidates

    @property
    def has_text(self) -> bool:
        """Whether there is or will be calibration text."""
        return True

    @property
    def num_experts(self) -> int:
        """Experts of every MoE layer of the input."""
        count = self.arch.num_experts(self.source.config)
        assert count is not None
        return count

    def reads(self) -> Mapping[str, Path]:
        return {"model": self.source.path}

    def expected_bytes(self) -> int:
        return reduced_bytes(self, self.target)

    def outline(self) -> Outline | None:
        packed, config, dropped = self.packed, self.new_config(), self.mtp.dropped
        if packed is not None:
            config |= {"quantization_config": packed.quantization}
            dropped = frozenset(disk for name in dropped for disk in packed.disk_names(name))
        whole = reduced_outline(self.source if packed is None else packed.disk, self.arch, config, self.target)
        left = {name: one for name, one in whole.tensors.items() if name not in dropped}
        return replace(whole, tensors=left)

    def new_config(self) -> dict[str, Any]:
        """config.json with the new number of experts."""
        return self.with_experts(self.target)

    def with_experts(self, experts: int) -> dict[str, Any]:
        """config.json for layers of so many experts."""
        config = self.arch.with_expert_count(self.source.config, experts)
        return self.arch.without_prediction(config) if self.mtp.mode == "drop" else config

    @cached_property
    def _smaller(self) -> StreamedModel:
        return StreamedModel(self.source, self.forward, config=self.new_config())

    def forget_output(self) -> None:
        """The config has changed since it was first asked for."""
        self.__dict__.pop("_smaller", None)

    def output(self) -> StreamedModel:
        return self._smaller

    def config(self) -> dict[str, Any]:
        if self.packed is None:
            return super().config()
        return {**super().config(), "quantization_config": kept_config(self.packed.quantization, self._kept)}

    def memory(self) -> MemoryPlan:
        plan = self._memory_of_layers()
        if self.mtp.mode != "follow":
            return plan
        found = [
            reducer.memory(self.data, self._solver_bytes() if self.needs_streams else 0)
            for reducer in (self.mtp_reducer(module, self.target) for module in self.mtp_modules)
        ]
        # The trunks stay, and the new one's hidden states are carried along while its layers are made.
        rest = plan.rest
        plan = replace(plan, rooms=plan.rooms + 1)
        for one in found:
            plan = plan.covering(replace(one, rest=one.rest + rest))
        return plan

    def _solver_bytes(self) -> int:
        shape, tokens = self.model.layer_shape(1), self.data.num_tokens if self.data else 0
        return max(solver_bytes(candidate.recipe, shape, self.target, tokens) for candidate in self.candidates)

    def _memory_of_layers(self) -> MemoryPlan:
        plan = self.model.memory_plan([], keep_native=True, beside=[self._smaller])
        if self.data is not None and self.measured_before:
            plan = plan.covering(calibration_plan(self.model, self.data, self.measured_before))
        if not self.needs_streams:
            return plan
        streams = streams_plan(
            self.model,
            self._smaller,
            self.data,
            sequential_statistics(self.candidates),
            sample_tokens=ROUTER_TOKENS,
            solver=self._solver_bytes(),
        )
        return plan.covering(streams)

    @property
    def measured_before(self) -> Sequence[str]:
        """Statistics of the original that are measured before the first layer is made."""
        return ()

    def estimate(self, rehearsal: Rehearsal) -> float:
        # MTP layers come behind all others, and take as long as one of them.
        followed = len(self.mtp_modules) if self.mtp.mode == "follow" else 0
        return super().estimate(rehearsal) * (1 + followed / self.model.num_layers)

    def settings(self) -> Mapping[str, Any]:
        return {
            "model": self.source.fingerprint(),
            "methods": [candidate.name for candidate in self.candidates],
            "recipes": [asdict(candidate.recipe) for candidate in self.candidates],
            "experts": self.target,
            "mtp": self.mtp.mode,
            "packed": self.packed is not None,
            "seed": self.seed,
            "data": self.data.fingerprint if self.data else None,
            "dtype": str(self.model.dtype),
        }

    def units(self, finished: FinishedUnits) -> Generator[Unit]:
        if self.mtp.mode == "follow":
            yield from self._units_and_mtp(finished)
            return
        rest = whole_rest(self.model, self.source, without=self.mtp.dropped, packed=self.packed is not None)
        yield replace(rest, facts=self.measured())
        for layer in self._layers(finished):
            yield self._unit(layer, finished)

    def _units_and_mtp(self, finished: FinishedUnits) -> Generator[Unit]:
        """The layers, then what is outside them: MTP layers are made behind both trunks."""
        stream: TrunkStream | None = None
        for layer in self._layers(finished):
            unit = self._unit(layer, finished)
            yield unit
            if self.data is None or None in finished:
                continue
            stream = stream or TrunkStream(self._smaller, self.data.batches, self.memory_plan)
            with self._smaller.filled(layer.index, unit.tensors) as ready:
                stream.through(ready)
        if None in finished:
            unit = Unit(index=None, tensors=finished[None], on_disk=never, facts=finished.facts(None))
        else:
            unit = self._rest_with_mtp(None if stream is None else stream.finish())
        for facts in unit.facts["mtp"]:
            self._remember(facts["layer"], facts)
        yield unit

    def _rest_with_mtp(self, after: TrunkStates | None) -> Unit:
        trunks, facts = self._trunks(after), []
        made: list[ReducedModule] = []
        experts = self.arch.num_experts(self.new_config())
        assert experts is not None
        for module in self.mtp_modules:
            reduced = self.mtp_reducer(module, experts).reduce(trunks, self.memory_plan)
            trunks = reduced.behind
            made.append(reduced)
            facts.append(reduced.facts)
        origin = [name for module in self.mtp_modules for name in module.layer_names]
        rest = whole_rest(self.model, self.source, without=frozenset(origin), packed=self.packed is not None)
        return Unit(
            index=None,
            tensors={**rest.tensors, **_joined(one.tensors for one in made)},
            on_disk=lambda: {**rest.on_disk(), **_joined(one.stored for one in made)},
            facts={**self.measured(), "mtp": facts},
        )

    def _trunks(self, after: TrunkStates | None) -> Trunks | None:
        if self.data is None or after is None:
            return None
        before = run_trunk(self.model, self.data.batches, self.memory_plan)
        return Trunks(data=self.data, before=before, after=after, top_before=before.top, top_after=after.top)

    def precision(self, outcome: Outcome) -> dict[str, Any]:
        """For the report: how weights are stored, and who read the output back."""
        kept = self.packed is not None
        uneven = "" if self.stock or self.stock_problem else "stock loaders refuse layers of different sizes"
        return {
            "precision": precision_note(self.source, kept=kept),
            "parts": compare_precision(self.source, outcome.checkpoint, self.arch, kept=kept),
            "unchecked": "; ".join(filter(None, [self.stock_problem, uneven, *outcome.notes]))
            if outcome.verified
            else "",
        }

    def complete(self, contents: Path) -> None:
        if self.packed is not None:
            carry_quantization_files(self.packed, contents, self._kept)

    def mtp_facts(self, outcome: Outcome) -> dict[str, Any] | None:
        """For the report: what became of the MTP layers."""
        facts, layers = self.mtp.facts(), outcome.facts.get(None, {}).get("mtp")
        return facts if facts is None or layers is None else {**facts, "layers": layers}

    def measured(self) -> Facts:
        """For the report: what was found out before the first layer."""
        return {}

    def _layers(self, finished: FinishedUnits) -> Iterator[ReducedLayer]:
        reducer = LayerReducer(
            candidates=self.candidates,
            arch=self.arch,
            keep=self.target,
            num_groups=self.arch.num_groups(self._smaller.config),
            seed=self.seed,
            statistics=self.statistics,
            protected=self.protected,
            keep_by_layer=self.keep_by_layer,
        )
        if not self.needs_streams:
            return reducer.layer_by_layer(self.model, finished, prefetch=self.memory_plan.prefetch)
        assert self.data is not None
        return reducer.stream_by_stream(self.model, self._smaller, self.data, self.memory_plan, finished)

    def _unit(self, layer: ReducedLayer, finished: FinishedUnits) -> Unit:
        stock, index = self.model.stock, layer.index
        if layer.replayed:
            self._remember(index, finished.facts(index))
            return Unit(index=index, tensors=layer.tensors, on_disk=never, facts=finished.facts(index))
        if layer.weights is None:
            read = self.source.read if self.packed is None else self.source.read_stored
            return Unit(index=index, tensors=layer.tensors, on_disk=lambda: read(stock.names[index]))
        facts = _facts(layer)
        self._remember(index, facts)
        return Unit(index=index, tensors=layer.tensors, on_disk=lambda: self._on_disk(layer), facts=facts)

    def _on_disk(self, layer: ReducedLayer) -> Mapping[str, Tensor]:
        assert layer.weights is not None
        assert layer.decision is not None
        stock, index = self.model.stock, layer.index
        if self.packed is None:
            return stock.disk_tensors(index, layer.native, layer.weights)
        return packed_layer(stock, index, layer.native, layer.weights, layer.decision.kept, self.packed)

    def _remember(self, layer: int, facts: Facts) -> None:
        """Which experts a layer of a packed checkpoint keeps, for config.json."""
        if self.packed is not None and "decision" in facts:
            self._kept[layer] = decision_of(facts).kept


def _joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _facts(layer: ReducedLayer) -> Facts:
    assert layer.decision is not None
    mass = None if layer.mass is None else [layer.mass[0], layer.mass[1].tolist()]
    return {"decision": asdict(layer.decision), "mass": mass}


def decision_of(facts: Facts) -> ExpertDecision:
    """The decision that was stored with a layer."""
    stored = facts["decision"]
    return ExpertDecision(
        clusters=tuple(tuple(cluster) for cluster in stored["clusters"]),
        weights=tuple(tuple(row) for row in stored["weights"]),
        router=stored["router"],
        details=stored["details"],
    )


def reduced_bytes(work: ReducedModel, keep: int) -> int:
    """Bytes of all tensors when every MoE layer has `keep` experts; routers shrink as well, by next to nothing."""
    mtp, arch, packed = work.mtp, work.arch, work.packed
    sizes = {
        name: info.nbytes if packed is None else packed.stored_bytes(name)
        for name, info in work.source.tensors.items()
        if name not in mtp.dropped
    }
    kept = mtp.tensors.names if mtp.tensors is not None and mtp.mode == "keep" else ()
    experts = sum(size for name, size in sizes.items() if arch.part_of(name) == "experts" and name not in kept)
    return sum(sizes.values()) - experts + experts * keep // work.num_experts
