"""Quantize a checkpoint: a grid for every matrix, codes layer by layer, packed tensors, a verified checkpoint."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.checkpoint.writer import CheckpointWriter, check_output
from moetools.errors import UserError
from moetools.formats.base import Format, default_format, load_format
from moetools.formats.gguf import check_gguf, export_gguf
from moetools.formats.preflight import check as preflight
from moetools.formats.reader import open_model, refuse_quantized
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.methods.quantize.base import QuantizeMethod
from moetools.passes.quantize_ends import EndsQuantizer, check_memory, refuse_not_finite
from moetools.passes.quantize_layer import LayerQuantizer, QuantizedLayer
from moetools.passes.quantize_pass import CalibratedLayer, QuantizePass
from moetools.passes.quantize_widths import choose_widths
from moetools.pipeline.estimate import estimate_seconds
from moetools.pipeline.stock_verification import verify_in_transformers
from moetools.pipeline.verification import Intended, probe_batch, tensor_digests, verify_checkpoint
from moetools.plugins import load_plugin
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenData
from moetools.verbs.quantize.expand import expand_checkpoint
from moetools.verbs.quantize.plan import DEFAULT_BITS, MIXED_BITS, QuantizeOptions, QuantizePlan, make_plan
from moetools.verbs.quantize.report import LayerErrors, QuantizationReport, describe_sizes, model_card
from moetools.verbs.reduce.report import versions

__all__ = ["QuantizationReport", "QuantizeOptions", "quantize"]

_SCRATCH_SHARE = 3


def quantize(
    model: Path,
    out: Path,
    data: DataOptions | None,
    forward: ForwardOptions,
    options: QuantizeOptions,
    *,
    command: str,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Write a quantized checkpoint, or with `options.expand` the plain one that a quantized checkpoint stands for.

    Args:
        command: the command line, for the report.

    Raises:
        MoetoolsError: see `Quantization`; nothing is left in place of `out`.
    """
    options.check()
    if options.expand:
        return expand_checkpoint(model, out, forward, options, command=command, progress=progress)
    return Quantization(model, out, data, forward, options, command, progress).run()


class Quantization:
    """One run; every check that needs no weights is made in `__init__`.

    Raises:
        UserError: unknown or contradictory options, a combination that would load wrong, unusable output, no text for a
            method that needs it, an input that is quantized already.
        CheckpointError, UnsupportedModelError: the input cannot be handled.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        data: DataOptions | None,
        forward: ForwardOptions,
        options: QuantizeOptions,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.started = time.monotonic()
        self.out, self.options, self.forward, self.command = Path(out), options, forward, command
        self.method: QuantizeMethod = load_plugin("moetools.methods.quantize", options.method, kind="method").METHOD
        self.source: Checkpoint = open_model(model)
        if not options.dequantize:
            refuse_quantized(self.source)
        self.model = StreamedModel(self.source, forward, progress=progress)
        self.model.stock.check_names()
        self.plan: QuantizePlan = make_plan(self.model, options)
        self.format = self._choose_format()
        self.notes = preflight(self.format.name, self.plan.grids, self.source, self.model.arch, options.target)
        if options.format == "gguf":
            check_gguf(self.source, self.plan.grids)
        self.new_bytes = self._expected_bytes()
        check_output(self.out, self.source, options.overwrite, options.resume, self.new_bytes)
        self._check_data(data)
        self.data = self._load_data(data)

    def _choose_format(self) -> Format:
        """The one format that stores all grids of the run.

        Raises:
            UserError: the format asked for does not store one of them.
        """
        grids = set(self.plan.grids.values())
        stock = {one.name: one for one in (default_format(grid) for grid in grids)}
        asked = self.options.format
        own = len(stock) > 1 or self.options.scheme in ("mixed", "sub1")
        if asked == "moetools" or (asked == "auto" and own) or self.options.quantizes_embeddings:
            return load_format("moetools")
        if self.options.scheme == "w8a8":
            return load_format("int-quantized")
        (chosen,) = stock.values() if len(stock) == 1 else (None,)
        if chosen is None or (asked == "compressed-tensors" and not chosen.stock):
            raise UserError(
                f"--format {asked} does not store {self.options.scheme} as asked",
                hint="--format moetools stores any mix; --expand writes a plain checkpoint of it",
            )
        return chosen

    def _check_data(self, data: DataOptions | None) -> None:
        has_data = data is not None and bool(data.data)
        if not has_data and (self.method.needs_inputs or self.options.scheme == "mixed"):
            why = f"method '{self.options.method}'" if self.method.needs_inputs else "scheme mixed"
            raise UserError(
                f"{why} measures what the weights see and needs text",
                hint="--data FILE (or NAME=FILE, repeated); --method rtn and hqq need none",
            )

    def _load_data(self, data: DataOptions | None) -> TokenData | None:
        if data is None or not data.data:
            return None
        return load_tokens(data, self.source, self.model.vocab_size)

    def _expected_bytes(self) -> int:
        total = sum(info.nbytes for name, info in self.source.tensors.items() if name not in self.plan.grids)
        for place in self.plan.everything:
            shape = self.source.tensors[place.name].shape
            count = shape[0] if len(shape) == 3 else 1
            total += int(self.plan.grids[place.name].storage_bits(*place.shape) * count) // 8
        return total

    def run(self) -> QuantizationReport:
        memory = self.model.memory_plan(self.data.batches if self.data else [], keep_native=True)
        memory.check()
        check_memory(self.plan.places[None], self.model.memory_budget)
        if self.options.dry_run:
            return self._dry_report()
        with CheckpointWriter(
            self.out,
            source=self.source,
            plan=self._settings(),
            expected_bytes=self.new_bytes,
            overwrite=self.options.overwrite,
            resume=self.options.resume,
        ) as writer:
            self._choose_widths()
            layers, intended = self._write(writer)
            contents = writer.assemble()
            quantized = time.monotonic()
            if self.options.verify:
                verify_checkpoint(contents, self.forward, intended, source=self.source, progress=self.model.progress)
                self._verify_in_transformers(contents)
            if self.options.format == "gguf":
                export_gguf(open_model(contents), contents / "model.gguf")
            report = self._report(
                layers,
                after=self._sizes(open_model(contents)),
                seconds={
                    "quantize": round(quantized - self.started, 3),
                    "verify": round(time.monotonic() - quantized, 3),
                },
            )
            writer.write_json("moetools.json", report.to_json())
            writer.write_text("README.md", model_card(report, self.model.arch.model_type))
            writer.commit()
        return report

    def _verify_in_transformers(self, contents: Path) -> None:
        """What stock transformers itself makes of the output, if it is meant to load it."""
        if self.format.stock and self.options.target != "vllm":
            note = verify_in_transformers(contents, self.forward)
            self.notes = [*self.notes, *([note] if note else [])]

    def _choose_widths(self) -> None:
        """Give every routed expert its width, for the scheme `mixed`."""
        if self.options.scheme != "mixed":
            return
        assert self.data is not None
        grids = choose_widths(
            self.model,
            self.data,
            self.plan.places,
            self.plan.grids,
            widths=MIXED_BITS,
            average=self.options.bits or DEFAULT_BITS["mixed"],
        )
        self.plan = replace(self.plan, grids={**self.plan.grids, **grids})

    def _settings(self) -> dict[str, Any]:
        """What determines every byte of the output, so that only the same run is ever resumed."""
        asked = {key: value for key, value in asdict(self.options).items() if key not in ("overwrite", "resume")}
        return {
            "verb": "quantize",
            "model": self.source.fingerprint(),
            "data": self.data.fingerprint if self.data else None,
            "dtype": str(self.model.dtype),
            "options": asked,
        }

    def _write(self, writer: CheckpointWriter) -> tuple[dict[int | None, LayerErrors], Intended]:
        """All units, and what was meant by them."""
        smaller = StreamedModel(self.source, self.forward)
        batch = smaller.on_device(probe_batch(self.data, smaller.vocab_size))
        digests: dict[int, dict[str, str]] = {}
        errors: dict[int | None, LayerErrors] = {}
        writer.carry_sidecars()
        config = {**self.source.config, "quantization_config": self.format.config(self.plan.grids, self.source)}
        writer.write_json("config.json", config)
        work_bytes = self.model.memory_budget // _SCRATCH_SHARE
        quantizer = LayerQuantizer(self.model.stock, self.method, self.format, self.plan.grids, work_bytes)
        ends = EndsQuantizer(quantizer, (self.model, smaller), self.plan.places[None])
        calibrated = QuantizePass(self.model, self.data)
        with torch.inference_mode():
            ends.embeddings()
            hidden = smaller.skeleton.enter(batch)[0]
            for layer in calibrated.layers():
                assert isinstance(layer, CalibratedLayer)
                refuse_not_finite(self.source, self.model.stock.names[layer.index], layer.native)
                result = quantizer.quantize(layer, self.plan.places[layer.index])
                digests[layer.index] = tensor_digests(result.native)
                errors[layer.index] = LayerErrors.of(result)
                self._write_unit(writer, layer.index, result)
                hidden = smaller.run_tensors(layer.index, result.native, batch, hidden)
                if layer.index + 1 == self.model.num_layers and ends.has_head:
                    ends.head(calibrated.behind())
            self._write_unit(writer, None, ends.result)
            logits = smaller.skeleton.logits(batch, hidden)
        if ends.result.reports:
            errors[None] = LayerErrors.of(ends.result)
        rest = tensor_digests(ends.result.native)
        return errors, Intended(digests=digests, batch=batch, logits=logits, rest=rest)

    def _write_unit(self, writer: CheckpointWriter, index: int | None, layer: QuantizedLayer) -> None:
        """One layer's tensors on disk, or those outside all layers, in the order of the original's names."""
        unit = "rest" if index is None else f"layer-{index:05d}"
        if unit in writer.finished:
            return
        names = [*self.model.stock.names[index], *(self.model.stock.extra_names if index is None else [])]
        plain = self.source.read([name for name in names if name not in layer.quantized])
        found: dict[str, torch.Tensor] = {}
        transposed = {place.name for place in self.plan.places[index] if place.expert and place.expert.transposed}
        for name in names:
            if name in plain:
                found[name] = plain[name]
                continue
            dtype = TORCH_DTYPES[self.source.tensors[name].dtype]
            # Only moetools' own format stores tensors of all experts, which some families transpose.
            layout = {"transposed": True} if name in transposed else {}
            found |= self.format.pack(name, layer.quantized[name], dtype, **layout)
        writer.write_unit(unit, found)

    def _report(self, layers: Mapping[int | None, LayerErrors], **fields: Any) -> QuantizationReport:
        return QuantizationReport(
            scheme=self.options.scheme,
            method=self.options.method,
            format=self.format.name,
            command=self.command,
            out=str(self.out),
            versions=versions(),
            seed=self.options.seed,
            input_path=str(self.source.path),
            input_fingerprint=self.source.fingerprint(),
            data=self.data.fingerprint if self.data else None,
            calibration_tokens=self.data.num_tokens if self.data else 0,
            group_size=self.plan.group_size,
            before=self._sizes(self.source),
            layers=layers,
            notes=self.notes,
            verified=self.options.verify,
            **fields,
        )

    def _sizes(self, checkpoint: Checkpoint) -> dict[str, float]:
        experts = [place.name for place in self.plan.everything if place.expert is not None]
        return describe_sizes(checkpoint, self.plan.grids, experts)

    def _dry_report(self) -> QuantizationReport:
        tokens = 3 * self.data.num_tokens if self.data else 0
        expected = estimate_seconds(
            self.model, tokens, read_bytes=2 * self.source.total_bytes, written_bytes=self.new_bytes
        )
        before = self._sizes(self.source)
        report = self._report({}, after=before | {"bytes": self.new_bytes}, seconds={"expected": round(expected, 1)})
        return replace(report, dry_run=True, verified=False)
