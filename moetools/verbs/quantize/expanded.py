"""The plain checkpoint that a quantized one stands for."""

from collections.abc import Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moetools.errors import UserError
from moetools.formats.reader import PackedCheckpoint, describe_quantization, open_model
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.finished import FinishedUnits
from moetools.pipeline.records import versions
from moetools.pipeline.work import Outcome, Unit, Work, whole_rest
from moetools.verbs.quantize.report import QuantizationReport, describe_sizes


class ExpandedModel(Work[QuantizationReport]):
    """Every tensor dequantized as the loader of its format does; the result loads anywhere.

    Raises:
        UserError: the input is not quantized.
        CheckpointError: corrupt codes or scales, naming the tensor.
    """

    def __init__(self, model: Path, forward: ForwardOptions, *, command: str, progress: Progress | None) -> None:
        source = open_model(model)
        if not isinstance(source, PackedCheckpoint):
            raise UserError(f"{model} is not quantized: there is nothing to expand")
        self.source: PackedCheckpoint = source
        self.forward, self.command = forward, command
        self.model = StreamedModel(source, forward, progress=progress)
        self.model.stock.check_names()

    def expected_bytes(self) -> int:
        return sum(info.nbytes for info in self.source.tensors.values())

    def memory(self) -> MemoryPlan:
        return self.model.memory_plan([], keep_native=True)

    def settings(self) -> Mapping[str, Any]:
        return {"verb": "expand", "model": self.source.fingerprint()}

    def output(self) -> StreamedModel:
        return self.model

    def config(self) -> dict[str, Any]:
        return self.source.config

    def units(self, finished: FinishedUnits) -> Generator[Unit]:
        stock, source = self.model.stock, self.source
        for index in range(self.model.num_layers):
            tensors = finished.get(index) or stock.read_layer(index)
            yield Unit(index=index, tensors=tensors, on_disk=partial(source.read, stock.names[index]))
        yield whole_rest(self.model, source)

    def report(self, outcome: Outcome) -> QuantizationReport:
        experts = [name for name in self.source.tensors if self.model.arch.part_of(name) == "experts"]
        before = describe_sizes(self.source, self.source.packed, experts)
        written = outcome.checkpoint
        planned = before | {"bytes": self.expected_bytes()}
        return QuantizationReport(
            scheme="none (expanded)",
            method="dequantize",
            format="plain",
            command=self.command,
            out=str(outcome.out),
            versions=versions(),
            seed=0,
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            model_type=self.model.arch.model_type,
            data=None,
            calibration_tokens=0,
            group_size=0,
            before=before,
            after=planned if written is None else describe_sizes(written, self.source.packed, experts),
            layers={},
            notes=[f"from {describe_quantization(self.source)}", *outcome.notes],
            verified=outcome.verified,
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            memory=outcome.memory,
            dry_run=outcome.dry_run,
        )
