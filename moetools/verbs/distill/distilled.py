"""A student that is trained: one that is made first, or one that exists."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moetools.pipeline.work import Outcome
from moetools.verbs.distill.dense_student import DenseStudent
from moetools.verbs.distill.report import DistillReport
from moetools.verbs.train.trained_model import TrainedModel


class TrainedStudent(TrainedModel[DistillReport]):
    """A trained student.

    Attributes:
        command: the command line, for the report.
    """

    maker: DenseStudent | None
    command = ""

    def settings(self) -> Mapping[str, Any]:
        return {"verb": "distill", **super().settings()}

    def report(self, outcome: Outcome) -> DistillReport:
        made = None
        if self.maker is not None:
            made = self.maker.made_report(replace(outcome if self.made is None else self.made, out=outcome.out))
        bounds = {"steps": self.training.steps, "epochs": self.training.epochs, "minutes": self.training.max_minutes}
        said = ", ".join(f"{value:g} {name}" for name, value in bounds.items() if value is not None)
        if outcome.dry_run and made is not None:
            made = replace(made, seconds=outcome.seconds)
        notes = (*self.plan().memory_notes(), f"training for {said}, whichever ends first")
        return DistillReport(
            command=self.command,
            out=str(outcome.out),
            made=made,
            training=self.trained_at(outcome.out),
            verified=outcome.verified,
            seconds=outcome.seconds,
            peak_memory=outcome.peak_memory,
            notes=notes if outcome.dry_run else tuple(outcome.notes),
        )
