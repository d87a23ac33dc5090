"""A checkpoint with its experts in an order that balances devices which hold consecutive ones."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moetools.architectures.base import find_architecture
from moetools.arguments import paths
from moetools.checkpoint.shards import file_digest
from moetools.errors import UserError
from moetools.formats.reader import open_model
from moetools.forward.calibrate import check_statistics, collect_statistics, load_statistics
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.methods.placement import Reordered
from moetools.passes.recipes import candidate_of
from moetools.pipeline.kept import measured_once
from moetools.pipeline.records import describe_output, versions
from moetools.pipeline.work import Outcome
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.place.options import PlaceOptions
from moetools.verbs.place.plan import NEEDS, Placement, check_order, check_sequences, plan_order
from moetools.verbs.place.report import PlaceReport
from moetools.verbs.reduce.reduced_model import ReducedModel, decision_of


class PlaceWork(ReducedModel):
    """One run of `place-experts`.

    Raises:
        UserError: no devices, devices that the experts do not fill evenly, or neither text nor statistics.
        CheckpointError, UnsupportedModelError: the input cannot be handled.
    """

    def __init__(
        self,
        model: Path,
        text: DataOptions,
        forward: ForwardOptions,
        options: PlaceOptions,
        *,
        command: str,
        progress: Progress | None,
    ) -> None:
        if options.devices is None:
            raise UserError("a placement needs to know how many devices there are", hint="`devices=4`")
        if not text.data and options.stats is None:
            raise UserError("a placement is made from text, and there is neither `data` nor `stats`", hint="`data`")
        self.text, self.options, self.command = text, options, command
        self.devices: int = options.devices
        self.placement: Placement | None = None
        self._order: dict[int, Sequence[int]] = {}
        source = open_model(model)
        candidate = candidate_of(Reordered(self._order), {})
        count = find_architecture(source.config).num_experts(source.config)
        assert count is not None
        super().__init__(
            source,
            forward,
            progress,
            verb="place-experts",
            candidates=[candidate],
            target=count,
            seed=text.seed,
            output_format=options.output_format,
        )
        self.stock = not self.stock_problem
        self.groups = self.arch.num_groups(source.config)
        check_order(self.num_experts, self.groups, self.devices)

    def reads(self) -> Mapping[str, Path]:
        return {**super().reads(), **dict(self.text.paths()), **dict(paths(self.options, "reads"))}

    def load(self) -> None:
        if self.text.data:
            self.data = load_tokens(self.text, self.source, self.model.vocab_size)
            check_sequences(self.data.num_sequences)
        if self.options.stats is not None:
            self.statistics = load_statistics(self.options.stats)
            check_statistics(
                self.statistics,
                model=self.source.fingerprint(),
                needs=NEEDS,
                data=self.data.fingerprint if self.data else None,
                num_experts=self.num_experts,
            )
            check_sequences(self.statistics.shape.num_sequences)

    @property
    def measured_before(self) -> Sequence[str]:
        return () if self.statistics is not None else NEEDS

    def settings(self) -> Mapping[str, Any]:
        saved = self.options.stats
        statistics = None if saved is None else file_digest(saved)
        return {"verb": "place-experts", **super().settings(), "devices": self.devices, "statistics": statistics}

    def prepare(self, scratch: Path) -> None:
        if self.statistics is None:
            assert self.data is not None
            measured = partial(collect_statistics, self.model, self.data, NEEDS, self.memory_plan)
            self.statistics = measured_once(scratch / "statistics.safetensors", measured)
        self.placement = plan_order(self.statistics, devices=self.devices, groups=self.groups)
        self._order.update({layer.index: layer.experts for layer in self.placement.layers})

    def report(self, outcome: Outcome) -> PlaceReport:
        before = describe_output(self.source)
        return PlaceReport(
            verb="place-experts",
            method=f"order for {self.devices} devices",
            command=self.command,
            out=str(outcome.out),
            versions=versions(),
            seed=self.seed,
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            model_type=self.arch.model_type,
            provenance=None if self.statistics is None else vars(self.statistics.provenance),
            before=before,
            after=before if outcome.checkpoint is None else describe_output(outcome.checkpoint),
            layers={index: decision_of(facts) for index, facts in outcome.layers.items()},
            load=None,
            verified=outcome.verified,
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            memory=outcome.memory,
            dry_run=outcome.dry_run,
            **self.precision(outcome),
            placement=self.placement,
        )
