"""A checkpoint with fewer experts in every MoE layer: what each layer becomes, whatever chose the experts."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import Checkpoint
from moetools.forward.calibrate import ModelStatistics, calibration_plan
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.forward.uneven import refuse_uneven
from moetools.methods.base import ExpertDecision
from moetools.passes.layer_reduction import LayerReducer, ReducedLayer, sequential_statistics
from moetools.passes.recipe_checks import solver_bytes
from moetools.passes.recipes import Candidate
from moetools.passes.sequential import ROUTER_TOKENS
from moetools.passes.two_streams import streams_plan
from moetools.pipeline.estimate import estimate_seconds
from moetools.pipeline.finished import FinishedUnits
from moetools.pipeline.outline import Outline, reduced_outline
from moetools.pipeline.work import Facts, Unit, Work, never, whole_rest
from moetools.verbs.reduce.report import ReduceReport

_LOG = logging.getLogger(__name__)


class ReducedModel(Work[ReduceReport]):
    """Fewer experts in every MoE layer.

    Args:
        verb: for messages.
        candidates: methods with their recipes; the best of several is taken for each layer.
        target: experts that every layer keeps.
        seed: for methods that draw at random.

    Attributes:
        statistics: measured on the original; None where methods need none or measure behind compressed layers.
        keep_by_layer: layers that keep another number of experts.

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
    ) -> None:
        self.source, self.forward = source, forward
        self.arch = find_architecture(self.source.config)
        refuse_uneven(self.source.config, verb)
        self.candidates, self.target, self.seed = tuple(candidates), target, seed
        self.sequential = all(candidate.recipe.sequential for candidate in candidates)
        self.needs_streams = any(candidate.needs_streams for candidate in candidates)
        self.statistics: ModelStatistics | None = None
        self.keep_by_layer: Mapping[int, int] = {}
        self.protected: Mapping[int, tuple[int, ...]] = {}
        self.model = StreamedModel(self.source, forward, progress=progress)
        self.model.stock.check_names()

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
        whole = reduced_outline(self.source, self.arch, self.new_config(), self.target)
        left_out = self.left_out
        return replace(whole, tensors={name: one for name, one in whole.tensors.items() if name not in left_out})

    def new_config(self) -> dict[str, Any]:
        """config.json with the new number of experts."""
        return self.with_experts(self.target)

    def with_experts(self, count: int) -> dict[str, Any]:
        """config.json for so many experts, without layers that are left out."""
        config = self.arch.with_expert_count(self.source.config, count)
        return self.arch.without_prediction(config) if self.left_out else config

    @property
    def left_out(self) -> frozenset[str]:
        """Tensors of layers for multi-token prediction that no engine would load.

        Every engine builds such a layer with as many experts as config.json counts for the others.
        """
        config, part_of = self.source.config, self.arch.part_of
        names = [name for name in self.model.stock.extra_names if self.arch.predicts_more(name, config)]
        unloadable = self.target != self.num_experts and any(part_of(name) in ("experts", "router") for name in names)
        return frozenset(names if unloadable else ())

    def left_out_note(self) -> list[str]:
        """A sentence on `left_out`, if there is something."""
        if not self.left_out:
            return []
        return [
            f"the layers for multi-token prediction ({len(self.left_out)} tensors) are left out: engines would build "
            f"them with {self.target} experts, and they have {self.num_experts}. The model runs without drafts"
        ]

    @cached_property
    def _smaller(self) -> StreamedModel:
        return StreamedModel(self.source, self.forward, config=self.new_config())

    def forget_output(self) -> None:
        """The config has changed since it was first asked for."""
        self.__dict__.pop("_smaller", None)

    def output(self) -> StreamedModel:
        return self._smaller

    def memory(self) -> MemoryPlan:
        plan = self.model.memory_plan([], keep_native=True, beside=[self._smaller])
        if self.data is not None and self.measured_before:
            plan = plan.covering(calibration_plan(self.model, self.data, self.measured_before))
        if not self.needs_streams:
            return plan
        shape, tokens = self.model.layer_shape(1), self.data.num_tokens if self.data else 0
        streams = streams_plan(
            self.model,
            self._smaller,
            self.data,
            sequential_statistics(self.candidates),
            sample_tokens=ROUTER_TOKENS,
            solver=max(solver_bytes(candidate.recipe, shape, self.target, tokens) for candidate in self.candidates),
        )
        return plan.covering(streams)

    @property
    def measured_before(self) -> Sequence[str]:
        """Statistics of the original that are measured before the first layer is made."""
        return ()

    def estimate(self) -> float:
        passes = 1 + (4 * len(self.candidates) if self.needs_streams else 0)
        tokens = passes * self.data.num_tokens if self.data else 0
        read, written = 2 * self.source.total_bytes, self.expected_bytes()
        return estimate_seconds(self.model, tokens, read_bytes=read, written_bytes=written)

    def settings(self) -> Mapping[str, Any]:
        return {
            "model": self.source.fingerprint(),
            "methods": [candidate.name for candidate in self.candidates],
            "recipes": [asdict(candidate.recipe) for candidate in self.candidates],
            "experts": self.target,
            "seed": self.seed,
            "data": self.data.fingerprint if self.data else None,
            "dtype": str(self.model.dtype),
        }

    def units(self, finished: FinishedUnits) -> Iterator[Unit]:
        for sentence in self.left_out_note():
            _LOG.warning(sentence)
        yield replace(whole_rest(self.model, self.source, self.left_out), facts=self.measured())
        for layer in self._layers(finished):
            yield self._unit(layer, finished)

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
            return Unit(index=index, tensors=layer.tensors, on_disk=never, facts=finished.facts(index))
        weights = layer.weights
        if weights is None:
            return Unit(index=index, tensors=layer.tensors, on_disk=lambda: self.source.read(stock.names[index]))
        return Unit(
            index=index,
            tensors=layer.tensors,
            on_disk=lambda: stock.disk_tensors(index, layer.native, weights),
            facts=_facts(layer),
        )


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
    left_out = work.left_out
    tensors = [(name, info) for name, info in work.source.tensors.items() if name not in left_out]
    experts = sum(info.nbytes for name, info in tensors if work.arch.part_of(name) == "experts")
    total = sum(info.nbytes for _, info in tensors)
    return total - experts + experts * keep // work.num_experts
