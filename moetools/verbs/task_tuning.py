"""Tune the routers of an extracted checkpoint towards the full model on the task's own text."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.checkpoint.writer import CheckpointWriter
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.forward.tokens import TokenData
from moetools.training.heal import HealResult, heal_routers
from moetools.verbs.compress_report import CompressReport
from moetools.verbs.task_routing import TaskRouting
from moetools.verbs.verification import Intended, probe_batch, tensor_digests, verify_checkpoint


def tune_routers(
    teacher: Checkpoint,
    report: CompressReport,
    extracted: Path,
    out: Path,
    tokens: TokenData,
    forward: ForwardOptions,
    *,
    steps: int,
    seed: int,
    verify: bool,
    progress: Progress | None,
) -> HealResult:
    """Train the routers of `extracted` for the predictions of `teacher`, and write the result to `out`.

    An extracted checkpoint's router is the full one under the task's mask, so this is training under the mask.

    Args:
        report: of the run that wrote `extracted`; goes on with what was tuned.
    """
    student = open_checkpoint(extracted)
    result = heal_routers(teacher, student, tokens, forward, steps=steps, train="router", seed=seed, progress=progress)
    model = StreamedModel(student, forward, progress=progress)
    plan = {"tuned": student.fingerprint(), "steps": steps}
    with CheckpointWriter(out, source=student, plan=plan, expected_bytes=student.total_bytes) as writer:
        intended = _write(writer, model, result.routers, tokens)
        contents = writer.assemble()
        if verify:
            verify_checkpoint(contents, forward, intended, source=student, progress=model.progress)
        facts = {"steps": result.steps, "trained": "router", "best_step": result.best_step, "curve": result.curve}
        writer.write_json("moetools.json", replace(report, healing=facts, verified=verify).to_json())
        writer.commit()
    return result


def _write(
    writer: CheckpointWriter,
    model: StreamedModel,
    routers: Mapping[int, Mapping[str, Tensor]],
    tokens: TokenData,
) -> Intended:
    stock, digests = model.stock, {}
    batch = model.on_device(probe_batch(tokens, model.vocab_size))
    writer.write_unit("rest", model.checkpoint.read([*stock.names[None], *stock.extra_names]))
    writer.carry_sidecars()
    writer.write_json("config.json", model.config)
    with torch.inference_mode():
        hidden = model.skeleton.enter(batch)[0]
        for layer in model.layers(keep_native=True, fill=False):
            assert layer.native is not None
            tensors: Mapping[str, Tensor] = layer.native
            on_disk = None
            if layer.index in routers:
                weights = replace(model.weights(layer), **routers[layer.index])
                tensors = stock.with_weights(layer.index, layer.native, weights)
                on_disk = stock.disk_tensors(layer.index, layer.native, weights)
            digests[layer.index] = tensor_digests(tensors)
            writer.write_unit(f"layer-{layer.index:05d}", on_disk or model.checkpoint.read(stock.names[layer.index]))
            hidden = model.run_tensors(layer.index, tensors, batch, hidden)
        logits = model.skeleton.logits(batch, hidden)
    return Intended(digests=digests, batch=batch, logits=logits)


def with_routers(routing: TaskRouting, task: str, result: HealResult) -> TaskRouting:
    """The routing with a task's tuned routers."""
    fields: dict[str, Any] = {**routing.routers, task: result.routers}
    return replace(routing, routers=fields)
