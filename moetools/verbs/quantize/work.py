"""What `quantize` makes: a grid for every matrix, codes layer by layer, packed tensors."""

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetools.arguments import paths
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import UserError
from moetools.formats.base import Format, default_format, load_format
from moetools.formats.gguf import check_gguf, export_gguf
from moetools.formats.imatrix import check_imatrix
from moetools.formats.mlx import FOLDER as MLX_FOLDER
from moetools.formats.mlx import check_mlx, export_mlx
from moetools.formats.preflight import ONE_KIND
from moetools.formats.preflight import check as preflight
from moetools.formats.reader import PackedCheckpoint, describe_quantization, open_model
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.methods.quantize.base import QuantizeMethod
from moetools.passes.quantize_ends import EndsQuantizer, scratch_of_ends
from moetools.passes.quantize_layer import LayerQuantizer, QuantizedLayer, scratch_of_layers
from moetools.passes.quantize_pass import CalibratedLayer, QuantizePass, quantize_plan
from moetools.passes.quantize_places import with_bits
from moetools.passes.quantize_widths import choose_widths
from moetools.passes.recipe_checks import check_held_out, least_refit_bytes
from moetools.pipeline.finished import FinishedUnits
from moetools.pipeline.kept import made_once
from moetools.pipeline.records import versions
from moetools.pipeline.work import Outcome, Unit, Work, never
from moetools.plugins import load_plugin
from moetools.text.options import DataOptions, load_tokens
from moetools.verbs.quantize.importance import ImportanceMatrix, matrix_bytes
from moetools.verbs.quantize.options import DEFAULT_BITS, QuantizeOptions
from moetools.verbs.quantize.plan import QuantizePlan, make_plan, mixed_widths
from moetools.verbs.quantize.report import LayerErrors, QuantizationReport, describe_sizes

_STACKING = ("gguf", "mlx")
"""Formats beside the checkpoint, in which the experts of a layer share a tensor."""


class QuantizedModel(Work[QuantizationReport]):
    """A checkpoint with packed weights.

    Raises:
        UserError: unknown or contradictory options, a combination that would load wrong, no text for a method that
            needs it.
        CheckpointError, UnsupportedModelError: the input cannot be handled.
    """

    def __init__(
        self,
        model: Path,
        text: DataOptions,
        forward: ForwardOptions,
        options: QuantizeOptions,
        *,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.text, self.forward, self.options, self.command = text, forward, options, command
        self.method: QuantizeMethod = load_plugin("moetools.methods.quantize", options.method, kind="method").METHOD
        self.source: Checkpoint = open_model(model)
        self.model = StreamedModel(self.source, forward, progress=progress)
        self.model.stock.check_names()
        self.plan: QuantizePlan = make_plan(self.model, options)
        self.format = self._choose_format()
        self.stock = self.format.stock and options.target != "vllm"
        self.notes = preflight(self.format.name, self.plan.grids, self.source, self.model.arch, options.target)
        self.notes = [*self.plan.notes, *self.notes]
        if options.format == "gguf":
            check_gguf(self.source, self.plan.grids)
        if options.format == "mlx":
            check_mlx(self.source, self.plan.grids)
        self._check_data()
        self.reference = None if options.reference is None else self._opened_reference(options.reference)

    def _opened_reference(self, path: Path) -> StreamedModel:
        """The model whose hidden states the experts are solved for.

        Raises:
            UserError: no text to solve on, or a model whose hidden states are not comparable.
        """
        if not self.text.data or not self.method.needs_inputs:
            raise UserError("`reference` solves on text, layer by layer", hint="`data`, and `method=gptq`")
        found = StreamedModel(open_model(path), self.forward)
        for name in ("num_layers", "hidden_size", "vocab_size"):
            here, there = getattr(self.model, name), getattr(found, name)
            if here != there:
                raise UserError(
                    f"`reference`: {path} has {name} {there}, {self.source.path} has {here}",
                    hint="the model that the other one was pruned or merged from",
                )
        return found

    def _choose_format(self) -> Format:
        """The one format that stores all grids of the run.

        Raises:
            UserError: the format asked for does not store one of them.
        """
        grids = set(self.plan.grids.values())
        stock = {one.name: one for one in (default_format(grid) for grid in grids)}
        asked = self.options.format
        own = len(stock) > 1 or self.options.scheme in ("mixed", "sub1")
        # No stock layout has all experts in one tensor; what llama.cpp and mlx-lm read does not depend on it.
        fused = any(len(self.source.tensors[name].shape) != 2 for name in self.plan.grids)
        own = (asked == "auto" and own) or (asked in _STACKING and (fused or own))
        if asked == "moetools" or own or self.options.quantizes_embeddings:
            return load_format("moetools")
        if self.options.scheme == "w8a8":
            return load_format("int-quantized")
        # The widths of `mixed` are known only once they are measured.
        (chosen,) = stock.values() if len(stock) == 1 and self.options.scheme != "mixed" else (None,)
        if chosen is None or (asked == "compressed-tensors" and not chosen.stock):
            storable = all(load_format("moetools").accepts(grid) for grid in grids)
            raise UserError(
                f"`format={asked}` does not store {self.options.scheme} as asked",
                hint="`format=moetools` `target=transformers` stores it" if storable else ONE_KIND,
            )
        return chosen

    def _check_data(self) -> None:
        if not self.text.data and (self.method.needs_inputs or self.options.scheme == "mixed"):
            why = f"method '{self.options.method}'" if self.method.needs_inputs else "scheme mixed"
            raise UserError(
                f"{why} measures what the weights see and needs text",
                hint="`data`; `method=rtn` and `method=hqq` need none",
            )
        if self.options.imatrix is not None:
            check_imatrix(self.options.imatrix)
            if not self.text.data:
                raise UserError("`imatrix` measures what the weights see and needs text", hint="`data`")

    def inputs(self) -> Sequence[Checkpoint]:
        return [self.source, *([] if self.reference is None else [self.reference.checkpoint])]

    def reads(self) -> Mapping[str, Path]:
        return {**super().reads(), **dict(self.text.paths()), **dict(paths(self.options, "reads"))}

    def writes(self) -> Mapping[str, Path]:
        return dict(paths(self.options, "writes"))

    def expected_bytes(self) -> int:
        total = sum(info.nbytes for name, info in self.source.tensors.items() if name not in self.plan.grids)
        for place in self.plan.everything:
            shape = self.source.tensors[place.name].shape
            count = shape[0] if len(shape) == 3 else 1
            total += self.format.stored_bytes(self.plan.grids[place.name], *place.shape) * count
        return total * (2 if self.options.format in ("gguf", "mlx") else 1)

    def load(self) -> None:
        if self.text.data:
            self.data = load_tokens(self.text, self.source, self.model.vocab_size)
            if self.reference is not None:
                check_held_out(self.data, "joint")

    def memory(self) -> MemoryPlan:
        scratch = max(scratch_of_ends(self.plan.places[None]), scratch_of_layers(self.method, self.plan.everything))
        if self.options.imatrix is not None:
            scratch += matrix_bytes(self.model)
        if self.reference is None:
            return quantize_plan(self.model, self.data, beside=[self._packed], solver=scratch)
        shape = self.model.layer_shape(1)
        solver = least_refit_bytes(shape.num_experts * shape.expert_size, shape.hidden_size)
        beside = [self._packed, self.reference]
        return quantize_plan(self.model, self.data, beside=beside, solver=max(scratch, solver), guided=True)

    def settings(self) -> Mapping[str, Any]:
        return {
            "verb": "quantize",
            "model": self.source.fingerprint(),
            "data": self.data.fingerprint if self.data else None,
            "seed": self.text.seed,
            "dtype": str(self.model.dtype),
            "options": {
                **asdict(self.options),
                "imatrix": self.options.imatrix is not None,
                "reference": None if self.reference is None else self.reference.checkpoint.fingerprint(),
            },
        }

    def prepare(self, scratch: Path) -> None:
        """Measure for the importance matrix, and give every routed expert its width, for the scheme `mixed`."""
        if self.options.imatrix is not None:
            assert self.data is not None
            self._matrix = ImportanceMatrix(self.model, self.data, self.memory_plan, scratch)
        if self.options.scheme != "mixed":
            return
        kept = made_once(scratch / "widths.json", self._measure_widths)
        grids = {name: with_bits(self.plan.grids[name], bits) for name, bits in read_json_object(kept).items()}
        self.plan = replace(self.plan, grids={**self.plan.grids, **grids})

    def _measure_widths(self, file: Path) -> None:
        assert self.data is not None
        widths = choose_widths(
            self.model,
            self.data,
            self.memory_plan,
            self.plan.places,
            self.plan.grids,
            widths=mixed_widths(self.options, self.plan.grids),
            average=self.options.bits or DEFAULT_BITS["mixed"],
            together=self.options.format in _STACKING,
        )
        write_durably(file, json.dumps(widths).encode())

    @cached_property
    def _packed(self) -> StreamedModel:
        return StreamedModel(self.source, self.forward)

    def output(self) -> StreamedModel:
        return self._packed

    def config(self) -> dict[str, Any]:
        return {**self.source.config, "quantization_config": self.format.config(self.plan.grids, self.source)}

    def units(self, finished: FinishedUnits) -> Generator[Unit]:
        plan = self.memory_plan
        quantizer = LayerQuantizer(self.model.stock, self.method, self.format, self.plan.grids, plan.scratch_budget)
        ends = EndsQuantizer(quantizer, (self.model, self._packed), self.plan.places[None], finished.get(None))
        calibrated = QuantizePass(self.model, self.data, plan, finished, to_end=ends.has_head, reference=self.reference)
        ends.embeddings()
        for layer in calibrated.layers():
            if isinstance(layer, CalibratedLayer):
                yield self._unit(quantizer.quantize(layer, self.plan.places[layer.index]))
            else:
                facts = finished.facts(layer.index)
                yield Unit(index=layer.index, tensors=layer.tensors, on_disk=never, facts=facts)
            if layer.index + 1 == self.model.num_layers and ends.has_head:
                ends.head(calibrated.behind())
        yield self._unit(ends.result)

    def _unit(self, layer: QuantizedLayer) -> Unit:
        facts = asdict(LayerErrors.of(layer)) if layer.index is not None or layer.reports else {}
        tensors = layer.native
        if layer.index is None:
            tensors = {**self.source.read(self._names(None)), **layer.native}
        return Unit(index=layer.index, tensors=tensors, on_disk=lambda: self._on_disk(layer), facts=facts)

    def _names(self, index: int | None) -> list[str]:
        stock = self.model.stock
        return [*stock.names[index], *(stock.extra_names if index is None else [])]

    def _on_disk(self, layer: QuantizedLayer) -> Mapping[str, Tensor]:
        """One layer's tensors, or those outside all layers, in the order of the original's names."""
        names = self._names(layer.index)
        plain = self.source.read([name for name in names if name not in layer.quantized])
        places = self.plan.places[layer.index]
        transposed = {place.name for place in places if place.expert and place.expert.transposed}
        found: dict[str, torch.Tensor] = {}
        for name in names:
            if name in plain:
                found[name] = plain[name]
                continue
            dtype = TORCH_DTYPES[self.source.tensors[name].dtype]
            # Only moetools' own format stores tensors of all experts, which some families transpose.
            layout = {"transposed": True} if name in transposed else {}
            found |= self.format.pack(name, layer.quantized[name], dtype, **layout)
        return found

    def complete(self, contents: Path) -> None:
        if self.options.format == "gguf":
            export_gguf(open_model(contents), contents / "model.gguf")
        if self.options.imatrix is not None:
            self._matrix.write(open_model(contents), self.options.imatrix, self.text.data)
        if self.options.format == "mlx":
            export_mlx(open_model(contents), contents / MLX_FOLDER)

    def _origin(self) -> list[str]:
        return [f"from {describe_quantization(self.source)}"] if isinstance(self.source, PackedCheckpoint) else []

    def report(self, outcome: Outcome) -> QuantizationReport:
        experts = [place.name for place in self.plan.everything if place.expert is not None]
        before = describe_sizes(self.source, self.plan.grids, experts)
        written = outcome.checkpoint
        planned = before | {"bytes": self.expected_bytes()}
        return QuantizationReport(
            scheme=self.options.scheme,
            method=self.options.method,
            format=self.format.name,
            command=self.command,
            out=str(outcome.out),
            versions=versions(),
            seed=self.text.seed,
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            model_type=self.model.arch.model_type,
            data=self.data.fingerprint if self.data else None,
            calibration_tokens=self.data.num_tokens if self.data else 0,
            group_size=self.plan.group_size,
            before=before,
            after=planned if written is None else describe_sizes(written, self.plan.grids, experts),
            layers={index: LayerErrors.restore(facts) for index, facts in outcome.facts.items() if facts},
            notes=[*self._origin(), *self.notes, *outcome.notes],
            verified=outcome.verified,
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            memory=outcome.memory,
            dry_run=outcome.dry_run,
        )
