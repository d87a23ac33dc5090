"""Distill: make a dense student of a MoE teacher, train a student towards its teacher, or both."""

from dataclasses import replace
from pathlib import Path

from moetools.checkpoint.output import staging_path
from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.pipeline.carry_out import carry_out
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.training.processes import join_processes
from moetools.verbs.distill.dense_student import DenseStudent
from moetools.verbs.distill.distilled import TrainedStudent
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.report import DistillReport

_FIT_SEQUENCES = 64


def distill(
    teacher: Path,
    out: Path,
    options: StudentOptions,
    training: TrainOptions,
    text: DataOptions,
    forward: ForwardOptions,
    writing: Writing,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> DistillReport | None:
    """Write a student of `teacher` to `out`.

    Several processes (torchrun, accelerate launch) train together; the first makes and writes the student, and only it
    returns a report.

    Raises:
        MoetoolsError: see `DenseStudent`, `TrainedStudent` and `carry_out`; nothing is left in place of `out`.
    """
    training = replace(training, seed=text.seed)
    training.check()
    options.check()
    if not text.data:
        raise UserError("distillation needs text", hint="`data`")
    if options.student is not None and not training.wanted:
        raise UserError(
            "`student` names a checkpoint to train, but nothing says for how long",
            hint="`steps`, `epochs` or `max_minutes`",
        )
    student: Path | DenseStudent | None = options.student
    if student is None:
        fitted = _fitted_on(options, text, training.wanted)
        student = DenseStudent(teacher, fitted, forward, options, seed=text.seed, command=command, progress=progress)
        if not training.wanted:
            return carry_out(student, out, writing)
    # Training reads all of the text, in epochs.
    everything = replace(text, samples="all" if text.samples is None else text.samples)
    work = TrainedStudent(teacher, student, everything, forward, training, progress=progress)
    work.command = command
    if writing.dry_run or join_processes(on_cpu=forward.torch_device().type == "cpu"):
        return carry_out(work, out, writing)
    work.how = writing
    work.load()
    work.assist(staging_path(out) / "scratch")
    return None


def _fitted_on(options: StudentOptions, text: DataOptions, trained: bool) -> DataOptions:
    """The text the student's layers are fitted on: that named for it, else the beginning of the data."""
    if options.calibration:
        return replace(text, data=options.calibration)
    if not trained:
        return text
    asked = text.samples if isinstance(text.samples, int) else _FIT_SEQUENCES
    return replace(text, samples=min(asked, _FIT_SEQUENCES))
