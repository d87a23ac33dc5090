"""Distill: make a dense student of a MoE teacher, train a student towards its teacher, or both."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.reader import open_checkpoint
from moetools.checkpoint.writer import check_output
from moetools.errors import UserError
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.pipeline.table import Table
from moetools.sizes import format_bytes
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenData
from moetools.training.processes import join_processes, wait_for_all
from moetools.verbs.distill.report import StudentReport
from moetools.verbs.distill.student import StudentOptions, StudentRun
from moetools.verbs.reduce.report import versions
from moetools.verbs.train.plan import StudentTraining, TrainingPlan
from moetools.verbs.train.training import TrainingReport, TrainingRun, training_card

_FIT_SEQUENCES = 64


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """What is asked of `distill`.

    Attributes:
        make: the student to make of the teacher; not looked at with `student`.
        student: a checkpoint to train instead.
        training: how the student is trained; trains nothing if it has no steps, epochs or minutes.
        calibration: text the student's layers are fitted on; None takes the beginning of the data.
        overwrite, resume: what to do about an existing output, or an interrupted run.
        dry_run: check everything, report sizes, memory and time, write nothing.
        verify: reload what was written and compare every tensor and the logits of a probe batch.
    """

    make: StudentOptions
    training: StudentTraining
    student: Path | None = None
    calibration: DataOptions | None = None
    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class DistillReport:
    """What a run did.

    Attributes:
        made: how the student was made; None for one that existed.
        training: None without any.
    """

    command: str
    out: str
    made: StudentReport | None
    training: TrainingReport | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        made = {"verb": "distill", "command": self.command, "out": self.out, "versions": versions()}
        if self.made is not None:
            made |= self.made.to_json()
        return made | {"training": None if self.training is None else self.training.to_json(), "notes": self.notes}

    def tables(self) -> list[Table]:
        """How the student was made, and how its training went."""
        tables = [] if self.made is None else self.made.tables()
        if self.training is not None:
            tables += training_tables(self.training, self.out)
        if self.notes:
            tables.append(
                Table(title="dry run: nothing written", columns=["note"], rows=[[note] for note in self.notes])
            )
        return tables


def distill(
    teacher: Path,
    out: Path,
    data: DataOptions | None,
    forward: ForwardOptions,
    options: DistillOptions,
    *,
    command: str,
    progress: Progress | None = None,
) -> DistillReport:
    """Write a student of `teacher` to `out`.

    Several processes (torchrun, accelerate launch) train together; the first makes and writes the student.

    Raises:
        MoetoolsError: see `StudentRun` and `TrainingRun`; nothing is left in place of `out`.
    """
    options.training.check()
    if data is None or not data.data:
        raise UserError("distillation needs text", hint="--data FILE (or NAME=FILE, repeated)")
    wanted = options.training.train.wanted
    if options.student is not None and not wanted:
        raise UserError(
            "--student names a checkpoint to train, but nothing says for how long",
            hint="--steps N, --epochs N or --max-minutes N",
        )
    tokens = _training_tokens(teacher, data, forward) if wanted else None
    if options.student is not None:
        assert tokens is not None
        return _trained(teacher, options.student, out, tokens, data, forward, options, None, command, progress)
    calibration = options.calibration or (_beginning(data) if wanted else data)
    # An untrained student is written whole and verified under another name; training then reads it like any other.
    place = untrained_path(out) if wanted else Path(out)
    first = join_processes(on_cpu=forward.torch_device().type == "cpu") if wanted else True
    made: StudentReport | None = None
    notes: tuple[str, ...] = ()
    if first:
        made, notes = _made(teacher, place, calibration, tokens, forward, options, out, command, progress)
    wait_for_all()
    if tokens is None or options.dry_run:
        return DistillReport(command=command, out=str(out), made=made, training=None, notes=notes)
    report = _trained(teacher, place, out, tokens, data, forward, options, made, command, progress)
    if first:
        shutil.rmtree(place)
    return report


def _training_tokens(teacher: Path, data: DataOptions, forward: ForwardOptions) -> TokenData:
    source = open_checkpoint(teacher)
    # Training reads all of it, in epochs.
    data = replace(data, samples=data.samples or "all")
    return load_tokens(data, source, StreamedModel(source, forward).vocab_size)


def untrained_path(out: Path) -> Path:
    """Where the student lies before it is trained."""
    return Path(out).with_name(f".{Path(out).name}.untrained")


def _beginning(data: DataOptions) -> DataOptions:
    asked = data.samples if isinstance(data.samples, int) else _FIT_SEQUENCES
    return replace(data, samples=min(asked, _FIT_SEQUENCES))


def _made(
    teacher: Path,
    place: Path,
    calibration: DataOptions,
    tokens: TokenData | None,
    forward: ForwardOptions,
    options: DistillOptions,
    out: Path,
    command: str,
    progress: Progress | None,
) -> tuple[StudentReport, tuple[str, ...]]:
    """The student, unless an interrupted run had finished it; and, in a dry run, what its training would need."""
    aside = place != Path(out)
    if aside:
        source = open_checkpoint(teacher)
        check_output(Path(out), source, options.overwrite, options.resume, 0)
    run = StudentRun(
        teacher,
        place,
        calibration,
        forward,
        options.make,
        command=command,
        overwrite=options.overwrite or aside,
        resume=options.resume and not (aside and place.exists()),
        verify=options.verify,
        progress=progress,
    )
    notes: tuple[str, ...] = ()
    if tokens is not None:
        # What training needs is checked before the student is made.
        plan = TrainingPlan(run.teacher, run.student, tokens, forward, options.training)
        plan.check_memory()
        notes = (*plan.memory_notes(), *_training_notes(options))
    if options.dry_run:
        return replace(run.dry_report(), out=str(out)), notes
    if aside and options.resume and _same_student(place, run):
        return replace(run.dry_report(), out=str(out), dry_run=False), ()
    return replace(run.run(), out=str(out)), ()


def _same_student(place: Path, run: StudentRun) -> bool:
    """Whether a finished student lies there that this run would make again."""
    file = place / "moetools.json"
    return file.is_file() and read_json_object(file).get("settings") == _as_json(run.settings())


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(one) for key, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def _trained(
    teacher: Path,
    student: Path,
    out: Path,
    tokens: TokenData,
    data: DataOptions,
    forward: ForwardOptions,
    options: DistillOptions,
    made: StudentReport | None,
    command: str,
    progress: Progress | None,
) -> DistillReport:
    run = TrainingRun(
        teacher,
        student,
        out,
        tokens,
        forward,
        options.training,
        tokenizer=data.tokenizer,
        overwrite=options.overwrite,
        resume=options.resume,
        verify=options.verify,
        progress=progress,
    )
    if options.dry_run:
        return DistillReport(
            command=command,
            out=str(out),
            made=made,
            training=None,
            notes=(*run.plan.memory_notes(), *_training_notes(options)),
        )
    before = DistillReport(command=command, out=str(out), made=made, training=None).to_json()

    def describe(training: TrainingReport, _contents: Path) -> tuple[Mapping[str, Any], str]:
        return {**before, "training": training.to_json()}, training_card(training, Path(out).name, command)

    training = run.run(describe)
    return DistillReport(command=command, out=str(out), made=made, training=training)


def _training_notes(options: DistillOptions) -> tuple[str, ...]:
    train = options.training.train
    bounds = {"steps": train.steps, "epochs": train.epochs, "minutes": train.minutes}
    said = ", ".join(f"{value:g} {name}" for name, value in bounds.items() if value is not None)
    return (f"training for {said}, whichever ends first",)


def training_tables(report: TrainingReport, out: str) -> list[Table]:
    """The course of the training, and the baseline."""
    trained, every = report.parameters
    tables = [
        Table(
            title=f"training {report.part}: {out}",
            columns=["step", "held-out loss", "divergence", "cross-entropy", "seconds"],
            rows=[
                [
                    f"{point['step']:.0f}",
                    *(f"{point[name]:.4f}" for name in ("loss", "divergence", "cross_entropy")),
                    f"{point['seconds']:.0f}",
                ]
                for point in report.curve
            ],
            note="; ".join(
                [
                    f"{trained:,} of {every:,} parameters, {report.tokens:,} tokens in {report.seconds:.0f} s "
                    f"({report.tokens / max(report.seconds, 1e-9):,.0f} per second)",
                    f"weights of step {report.best_step}",
                    *([f"stopped: {report.stopped}"] if report.stopped else []),
                    *([f"teacher cached in {format_bytes(report.cached)}"] if report.cached is not None else []),
                ]
            ),
        )
    ]
    if report.baseline is not None:
        entropies, kept = report.baseline["cross_entropy"], report.baseline["gain_kept"]
        share = "the teacher is no better than the baseline" if kept is None else f"{100 * kept:.1f} % of the gain kept"
        tables.append(
            Table(
                title=f"against the same student trained without the teacher ({report.baseline['kind']})",
                columns=["", "cross-entropy"],
                rows=[[name, f"{value:.4f}"] for name, value in entropies.items()],
                note=f"{share}, {report.baseline['steps']} steps each; held-out sequences of the training text",
            )
        )
    return tables
