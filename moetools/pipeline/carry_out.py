"""The one way to write a checkpoint: check, plan memory, make the units, verify them in stock transformers, publish."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetools.architectures.attention import without_hindrances
from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.output import check_apart, check_output, staging_path
from moetools.checkpoint.shards import file_digest
from moetools.checkpoint.staging import Staging
from moetools.checkpoint.writer import CheckpointWriter, OutputWriter
from moetools.formats.reader import open_model
from moetools.forward.memory import MemoryPlan
from moetools.forward.progress import PhaseClock
from moetools.pipeline.estimate import Rehearsal
from moetools.pipeline.finished import FinishedUnits, unit_name
from moetools.pipeline.options import Writing
from moetools.pipeline.outline import is_outline, write_outline
from moetools.pipeline.stages import Stages
from moetools.pipeline.stock_verification import StockProcess, verify_in_transformers
from moetools.pipeline.unchanged import Unchanged
from moetools.pipeline.verification import Intended, probe_batch, tensor_digests, verify_checkpoint
from moetools.pipeline.work import Facts, Folder, Made, Outcome, Output, Unit, Work


def carry_out(work: Output[Made], out: Path, how: Writing) -> Made:
    """Make the output of `work` at `out`, complete and verified, or not at all.

    Inputs are never changed. A run that is killed at any moment leaves `out` as it was and can be resumed: finished
    units are read back and replayed, so that the rest of the run is what it would have been.

    Raises:
        UserError: an output that cannot be used or touches an input; too little memory, with the numbers.
        CheckpointError: disk full or failing; an input that changed meanwhile.
        VerificationError: what was written does not load as it was meant; nothing is put in the place of `out`.
        MoetoolsError: whatever the work itself refuses.
    """
    out = Path(out)
    check_apart({"output": out, **work.writes()}, work.reads())
    if not (how.overwrite or how.dry_run):
        _sweep(out)
    check_output(out, how.overwrite, how.resume, work.expected_bytes())
    work.load()
    memory = work.memory()
    memory.check()
    if how.dry_run:
        if how.outline is not None and (outline := work.outline()) is not None:
            write_outline(outline, work.source, how.outline)
        seconds = _expected_seconds(work, memory, how)
        return work.report(_outcome(out, memory, seconds=seconds, dry_run=True))
    return work.report(_write(work, out, how, memory))


def _expected_seconds(work: Output[Any], memory: MemoryPlan, how: Writing) -> dict[str, float]:
    """What the run will take, in the words of a report; nothing where its input is an outline, which has no weights."""
    if any(is_outline(checkpoint.path) for checkpoint in work.inputs()):
        return {}
    return {"expected": round(work.estimate(Rehearsal(memory, verify=how.verify)), 1)}


def _sweep(out: Path) -> None:
    """A run that died behind its last step has left a complete `out` and a staging folder that nobody needs."""
    # A folder that cannot be written is refused with better words later.
    with suppress(OSError):
        if out.exists() and staging_path(out).is_dir():
            Staging(out).sweep()


def stage_checkpoint(
    work: Work[Any], scratch: Path, name: str, how: Writing, memory: MemoryPlan
) -> tuple[Outcome, Path]:
    """Make the checkpoint of `work` inside another output's scratch folder, once.

    Its outcome is kept beside it, for a run that is resumed behind it, with a digest of every file: what has changed
    since is made again. `memory` is the plan of the whole run.

    Returns:
        The outcome, and where the checkpoint is.
    """
    folder, record = scratch / name, scratch / f"{name}.json"
    if not record.is_file() or read_json_object(record)["files"] != _digests(folder):
        outcome = _write(work, folder, replace(how, overwrite=True, resume=True), memory)
        kept: dict[str, Any] = {
            "seconds": outcome.seconds,
            "peak_memory": outcome.peak_memory,
            "verified": outcome.verified,
            "files": _digests(folder),
        }
        facts = [[index, found] for index, found in outcome.facts.items()]
        write_durably(record, json.dumps({**kept, "notes": list(outcome.notes), "facts": facts}).encode())
    stored = read_json_object(record)
    del stored["files"]
    stored["facts"] = dict(stored["facts"])
    return _outcome(folder, memory, checkpoint=open_model(folder), **stored), folder


def _digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file_digest(file) for file in files}


def _outcome(out: Path, memory: MemoryPlan, **known: Any) -> Outcome:
    nothing: dict[str, Any] = {"checkpoint": None, "facts": {}, "seconds": {}, "peak_memory": {}, "verified": False}
    return Outcome(out=out, memory=memory, **{**nothing, **known})


def _write(work: Output[Any], out: Path, how: Writing, memory: MemoryPlan) -> Outcome:
    work.how, work.memory_plan = how, memory
    stages, clock = Stages(work.model.device), PhaseClock(work.model.progress)
    same_inputs = Unchanged(work.inputs(), writes=True)
    settings: dict[str, Any] = {
        "plan": work.settings(),
        "expected_bytes": work.expected_bytes(),
        "overwrite": how.overwrite,
        "resume": how.resume,
    }
    made = _Meant()
    with CheckpointWriter(out, **settings) if isinstance(work, Work) else OutputWriter(out, **settings) as writer:
        try:
            work.model.progress = clock
            with same_inputs:
                _make_all(work, writer, stages, made, memory)
        finally:
            work.model.progress = clock.shown
        outcome = _outcome(
            out,
            memory,
            checkpoint=open_model(writer.contents) if isinstance(work, Work) else None,
            facts=made.facts,
            seconds={**stages.seconds, **{f"of it {name}": round(took, 3) for name, took in clock.seconds.items()}},
            peak_memory=stages.peak_memory,
            verified=how.verify,
            notes=made.notes,
        )
        report = work.report(outcome)
        writer.write_json("moetools.json", report.to_json())
        writer.write_text("README.md", report.card())
        writer.commit()
    return replace(outcome, checkpoint=open_model(out) if isinstance(work, Work) else None)


def _make_all(work: Output[Any], writer: OutputWriter, stages: Stages, made: "_Meant", memory: MemoryPlan) -> None:
    if isinstance(writer, CheckpointWriter):
        assert isinstance(work, Work)
        _fill(work, writer, stages, made, memory)
    else:
        assert isinstance(work, Folder)
        work.fill(writer, stages)


def _fill(work: Work[Any], writer: CheckpointWriter, stages: Stages, made: "_Meant", memory: MemoryPlan) -> None:
    if work.how.verify and work.stock:
        # It imports its libraries while this process computes.
        StockProcess.started()
    with stages("prepare"):
        work.prepare(writer.scratch)
    with stages("write"):
        intended = _make(work, writer, made)
        contents = writer.assemble()
    if work.how.verify:
        with stages("verify"):
            made.notes += _verify(work, contents, intended, memory)
    work.complete(contents)


@dataclass
class _Meant:
    """What was meant by the units so far, and what is said of them."""

    digests: dict[int | None, Mapping[str, str]] = field(default_factory=dict)
    facts: dict[int | None, Facts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _make(work: Work[Any], writer: CheckpointWriter, made: _Meant) -> Intended:
    """Write every unit that is not finished, and run a probe batch through all of them."""
    model = work.output()
    writer.carry_sidecars(work.source)
    config = without_hindrances(work.config())
    writer.write_json("config.json", config)
    finished = FinishedUnits(writer, config, model.num_layers, work.forward)
    batch = model.on_device(probe_batch(work.data, model.vocab_size))
    hidden: Tensor | None = None
    # Not inference mode: a work may train what it makes.
    with torch.no_grad():
        for unit in _written(work, writer, finished, made):
            if unit.index is not None:
                hidden = model.skeleton.enter(batch)[0] if hidden is None else hidden
                hidden = model.run_tensors(unit.index, unit.tensors, batch, hidden)
        assert hidden is not None, "a model has layers"
        logits = model.skeleton.logits(batch, hidden)
    if without_hindrances(work.config()) != config:
        writer.write_json("config.json", without_hindrances(work.config()))
    intended = Intended(digests=made.digests, batch=batch, logits=logits)
    work.check(intended)
    return intended


def _written(work: Work[Any], writer: CheckpointWriter, finished: FinishedUnits, made: _Meant) -> Iterator[Unit]:
    """Every unit, on disk by the time it is handed on."""
    for unit in work.units(finished):
        name = unit_name(unit.index)
        if name not in writer.finished:
            work.model.progress.phase("writing")
            facts = {"digests": tensor_digests(unit.tensors), "facts": dict(unit.facts)}
            writer.write_unit(name, unit.on_disk(), facts)
        stored = writer.payload(name)
        made.digests[unit.index], made.facts[unit.index] = stored["digests"], stored["facts"]
        yield unit


def _verify(work: Work[Any], contents: Path, intended: Intended, memory: MemoryPlan) -> list[str]:
    verify_checkpoint(contents, work.forward, intended, progress=work.model.progress, prefetch=memory.prefetch)
    note = verify_in_transformers(contents, work.forward, intended) if work.stock else None
    return [note] if note else []
