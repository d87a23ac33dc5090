"""What a run did, or would do: one row per step, then what the steps cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetools.pipeline.table import Table


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step.

    Attributes:
        state: "done", "unchanged" (not done again), or in a dry run "would run", "unchanged".
        nbytes: of all tensors that it writes; None where it writes none, or in a dry run cannot tell.
        note: what could not be told in a dry run; what became of the output.
        report: the verb's own, as JSON; None where it has not run.
        tables: as the verb shows it.
    """

    name: str
    verb: str
    words: str
    state: str
    note: str
    seconds: float
    nbytes: int | None
    out: Path | None
    report: Mapping[str, Any] | None
    tables: tuple[Table, ...]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run did, or in a dry run would do.

    Attributes:
        out: folder of all outputs.
        steps: in order.
        comparison: what `compare` found of all outputs; None without `report` in the recipe.
    """

    about: str
    out: Path
    steps: tuple[StepReport, ...]
    comparison: StepReport | None
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        steps = [
            {
                "name": step.name,
                "verb": step.verb,
                "state": step.state,
                "seconds": step.seconds,
                "bytes": step.nbytes,
                "out": None if step.out is None else str(step.out),
                "report": step.report,
            }
            for step in self.steps
        ]
        comparison = None if self.comparison is None else self.comparison.report
        return {"out": str(self.out), "dry_run": self.dry_run, "steps": steps, "comparison": comparison}

    def tables(self) -> list[Table]:
        """The steps; then the comparison or, in a dry run and without one, what every step says of itself."""
        if self.comparison is not None and not self.dry_run:
            return [self._steps(), *self.comparison.tables]
        own = [replace(table, title=f"{step.name}: {table.title}") for step in self.steps for table in step.tables[:1]]
        return [self._steps(), *own]

    def _steps(self) -> Table:
        rows = [self._row(step) for step in (*self.steps, *([self.comparison] if self.comparison else []))]
        title = f"{self.about or 'run'}: {self.out}" + (" (dry run, nothing written)" if self.dry_run else "")
        columns = ["Step", "Verb", "With", "MB", "State", "Seconds", ""]
        return Table(title=title, columns=columns, rows=rows)

    def _row(self, step: StepReport) -> Sequence[str]:
        size = "" if step.nbytes is None else f"{step.nbytes / 1e6:,.2f}"
        seconds = f"{step.seconds:.1f}" if step.seconds else ""
        return [step.name, step.verb, step.words, size, step.state, seconds, step.note]
