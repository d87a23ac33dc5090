"""Write the plain checkpoint that a quantized one stands for."""

import time
from pathlib import Path

import torch

from moetools.checkpoint.writer import CheckpointWriter, check_output
from moetools.errors import UserError
from moetools.formats.reader import PackedCheckpoint, describe_quantization, expand, open_model
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.verification import Intended, probe_batch, tensor_digests, verify_checkpoint
from moetools.verbs.quantize.plan import QuantizeOptions
from moetools.verbs.quantize.report import QuantizationReport, describe_sizes, model_card
from moetools.verbs.reduce.report import versions


def expand_checkpoint(
    model: Path,
    out: Path,
    forward: ForwardOptions,
    options: QuantizeOptions,
    *,
    command: str,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Dequantize every tensor as the loader of its format does and write a plain checkpoint, which loads anywhere.

    Raises:
        UserError: the input is not quantized, or the output cannot be used.
        CheckpointError: corrupt codes or scales, naming the tensor.
    """
    started = time.monotonic()
    source = open_model(model)
    if not isinstance(source, PackedCheckpoint):
        raise UserError(f"{model} is not quantized: there is nothing to expand")
    new_bytes = sum(info.nbytes for info in source.tensors.values())
    check_output(Path(out), source, options.overwrite, options.resume, new_bytes)
    streamed = StreamedModel(source, forward, progress=progress)
    streamed.stock.check_names()
    experts = [name for name in source.tensors if streamed.arch.part_of(name) == "experts"]
    before = describe_sizes(source, source.packed, experts)
    report = QuantizationReport(
        scheme="none (expanded)",
        method="dequantize",
        format="plain",
        command=command,
        out=str(out),
        versions=versions(),
        seed=options.seed,
        input_path=str(source.path),
        input_fingerprint=source.fingerprint(),
        data=None,
        calibration_tokens=0,
        group_size=0,
        before=before,
        after=before | {"bytes": new_bytes},
        layers={},
        verified=False,
        seconds={},
        notes=[f"from {describe_quantization(source)}"],
        dry_run=True,
    )
    if options.dry_run:
        return report
    with CheckpointWriter(
        out,
        source=source,
        plan={"verb": "expand", "model": source.fingerprint()},
        expected_bytes=new_bytes,
        overwrite=options.overwrite,
        resume=options.resume,
    ) as writer:
        for unit, tensors in expand(source):
            if unit not in writer.finished:
                writer.write_unit(unit, tensors)
        writer.carry_sidecars()
        writer.write_json("config.json", source.config)
        contents = writer.assemble()
        written = time.monotonic()
        if options.verify:
            intended = _intended(streamed)
            verify_checkpoint(contents, forward, intended, source=source, progress=streamed.progress)
        done = {"write": round(written - started, 3), "verify": round(time.monotonic() - written, 3)}
        fields = {**report.__dict__, "after": describe_sizes(open_model(contents), source.packed, experts)}
        report = QuantizationReport(**{**fields, "verified": options.verify, "seconds": done, "dry_run": False})
        writer.write_json("moetools.json", report.to_json())
        writer.write_text("README.md", model_card(report, streamed.arch.model_type))
        writer.commit()
    return report


def _intended(streamed: StreamedModel) -> Intended:
    """Every fused tensor and the probe's logits of the packed model."""
    batch = streamed.on_device(probe_batch(None, streamed.vocab_size))
    digests = {}
    with torch.inference_mode():
        hidden = streamed.skeleton.enter(batch)[0]
        for layer in streamed.layers(keep_native=True):
            assert layer.native is not None
            digests[layer.index] = tensor_digests(layer.native)
            hidden = streamed.run_layer(layer, batch, hidden)
        return Intended(digests=digests, batch=batch, logits=streamed.skeleton.logits(batch, hidden))
