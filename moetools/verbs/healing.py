"""Short training of a reduced model towards the original's predictions, from a folder on disk to a folder on disk."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from moetools.checkpoint.reader import open_checkpoint
from moetools.checkpoint.writer import CheckpointWriter, check_output
from moetools.errors import UserError
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.forward.tokens import TokenBatch
from moetools.training.heal import HealResult, check_memory, heal_routers
from moetools.training.parameters import Train
from moetools.verbs.compress_report import CompressReport, describe_output, model_card
from moetools.verbs.options import DataOptions, load_tokens
from moetools.verbs.reduction import Reduction
from moetools.verbs.verification import Intended, probe_batch, tensor_digests, verify_checkpoint

TRAINED: dict[str, Train] = {"router": "router", "experts": "router+experts"}


def check_heal(steps: int, train: str, data: DataOptions | None) -> None:
    """Refuse healing that cannot run.

    Raises:
        UserError: no text, a negative number of steps, or an unknown part to train.
    """
    if train not in TRAINED:
        raise UserError(f"--heal-train '{train}' is unknown; legal: {', '.join(TRAINED)}")
    if steps < 1:
        raise UserError(f"--heal {steps} is below 1")
    if data is None or not data.data:
        raise UserError("--heal trains on text", hint="--data FILE (or NAME=FILE, repeated)")


def check_heal_memory(reduction: Reduction, steps: int, train: str) -> None:
    """Refuse healing whose models would not fit, before the reduction it follows has begun.

    Raises:
        UserError: with the numbers.
    """
    assert reduction.data is not None
    student = StreamedModel(reduction.source, reduction.forward, config=reduction.config)
    check_memory(reduction.model, student, reduction.data, steps=steps, train=TRAINED[train])


def heal_checkpoint(
    report: CompressReport,
    reduced: Path,
    out: Path,
    forward: ForwardOptions,
    data: DataOptions | None,
    *,
    steps: int,
    train: str,
    overwrite: bool,
    verify: bool,
    progress: Progress | None,
) -> CompressReport:
    """Heal the checkpoint `reduced`, write the result to `out`, verify it and remove `reduced`.

    Args:
        report: of the run that wrote `reduced`; its `input_path` names the teacher.

    Returns:
        The same report, with what healing did.
    """
    assert data is not None
    teacher, student = open_checkpoint(report.input_path), open_checkpoint(reduced)
    check_output(out, student, overwrite, False, student.total_bytes)
    model = StreamedModel(student, forward, progress=progress)
    tokens = load_tokens(data, teacher, model.vocab_size)
    result = heal_routers(
        teacher, student, tokens, forward, steps=steps, train=TRAINED[train], seed=report.seed, progress=progress
    )
    plan = {"healed": student.fingerprint(), "steps": steps, "train": train}
    with CheckpointWriter(
        out, source=student, plan=plan, expected_bytes=student.total_bytes, overwrite=overwrite
    ) as writer:
        intended = _write(writer, model, result, probe_batch(tokens, model.vocab_size))
        contents = writer.assemble()
        if verify:
            verify_checkpoint(contents, forward, intended, source=student, progress=model.progress)
        healed = replace(
            report,
            out=str(out),
            after=describe_output(open_checkpoint(contents)),
            verified=verify,
            seconds={**report.seconds, "heal": round(result.seconds, 3)},
            healing={
                "steps": result.steps,
                "trained": TRAINED[train],
                "best_step": result.best_step,
                "curve": result.curve,
            },
        )
        writer.write_json("moetools.json", healed.to_json())
        writer.write_text("README.md", model_card(healed, model.arch.model_type))
        writer.commit()
    shutil.rmtree(reduced)
    return healed


def _write(writer: CheckpointWriter, model: StreamedModel, result: HealResult, batch: TokenBatch) -> Intended:
    """All units of the healed model, and what was meant by them."""
    stock, digests = model.stock, {}
    batch = model.on_device(batch)
    writer.write_unit("rest", model.checkpoint.read([*stock.names[None], *stock.extra_names]))
    writer.carry_sidecars()
    writer.write_json("config.json", model.config)
    with torch.inference_mode():
        hidden = model.skeleton.enter(batch)[0]
        for layer in model.layers(keep_native=True, fill=False):
            assert layer.native is not None
            tensors, on_disk = layer.native, None
            if layer.index in stock.moe_layers:
                changed = {**result.routers.get(layer.index, {}), **result.experts.get(layer.index, {})}
                weights = replace(model.weights(layer), **changed)
                tensors = stock.with_weights(layer.index, layer.native, weights)
                on_disk = stock.disk_tensors(layer.index, layer.native, weights)
            digests[layer.index] = tensor_digests(tensors)
            writer.write_unit(f"layer-{layer.index:05d}", on_disk or model.checkpoint.read(stock.names[layer.index]))
            hidden = model.run_tensors(layer.index, tensors, batch, hidden)
        logits = model.skeleton.logits(batch, hidden)
    return Intended(digests=digests, batch=batch, logits=logits)
