"""What `compress` found: every plan that fits, predicted and measured, and which one was taken."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetools.pipeline.table import Table
from moetools.sizes import format_bytes
from moetools.verbs.compress.candidates import Candidate

_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class RatedPlan:
    """One plan that fits.

    Attributes:
        predicted: KL on held-out text, nats per token; None in a dry run.
        measured: the same of the built plan; None where it was not built.
        file_bytes: of its weight files, once built.
        chosen: it is the output, or the one that the plan file builds.
        healed: trained towards the original's predictions after it was built.
    """

    plan: Candidate
    predicted: float | None = None
    measured: float | None = None
    file_bytes: int | None = None
    chosen: bool = False
    healed: bool = False

    def words(self) -> str:
        """In a line."""
        return f"{self.plan.words()}, healed" if self.healed else self.plan.words()

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of what was measured."""
        if self.predicted is None or not self.measured:
            return None
        return abs(self.predicted - self.measured) / self.measured

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.plan.method,
            "experts": self.plan.experts,
            "bits": asdict(self.plan.bits),
            "bytes": self.plan.nbytes,
            "predicted_kl": self.predicted,
            "measured_kl": self.measured,
            "file_bytes": self.file_bytes,
            "chosen": self.chosen,
            "healed": self.healed,
        }


@dataclass(frozen=True, kw_only=True)
class CompressReport:
    """What `compress` found and built.

    Attributes:
        original, budget: bytes of the original's weight files, and those the result may have.
        cache: bytes of keys and values that were taken off the budget.
        target: what loads the result.
        plans: the most promising first.
        probes: how many choices were measured on little text.
        passes: over the calibration text, that all of them took together; None in a dry run.
        interaction: of fewer experts with fewer bits, see `Prediction`; None in a dry run.
        seconds: of measuring single choices, and of building and measuring plans.
        plan_file: the recipe of the chosen plan; None unless it was asked for.
    """

    command: str
    out: str
    original: int
    budget: int
    cache: int
    target: str
    plans: Sequence[RatedPlan]
    probes: int
    passes: float | None
    interaction: float | None
    seconds: Mapping[str, float]
    plan_file: Path | None

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        plain = {name: value for name, value in self.__dict__.items() if name not in ("plans", "plan_file")}
        plan_file = None if self.plan_file is None else str(self.plan_file)
        return {**plain, "plan_file": plan_file, "plans": [one.to_json() for one in self.plans]}

    def tables(self) -> list[Table]:
        """The most promising plans."""
        rows = [self._row(one) for one in self.plans[:_SHOWN]]
        columns = ["Plan", "MB", "Predicted KL", "Measured KL", "Chosen"]
        title = (
            f"compress to {format_bytes(self.budget)} of {format_bytes(self.original)} for {self.target}: {self.out}"
        )
        return [Table(title=title, columns=columns, rows=rows, note=self._note())]

    def _row(self, one: RatedPlan) -> list[str]:
        nbytes = one.plan.nbytes if one.file_bytes is None else one.file_bytes
        numbers = ["" if value is None else f"{value:.4f}" for value in (one.predicted, one.measured)]
        return [one.words(), f"{nbytes / 1e6:,.2f}", *numbers, "*" if one.chosen else ""]

    def _note(self) -> str:
        hidden = len(self.plans) - _SHOWN
        parts = [f"{hidden} plans that promise less are not shown"] if hidden > 0 else []
        if self.cache:
            parts.append(f"{format_bytes(self.cache)} more are left for keys and values")
        if self.interaction is None:
            return "; ".join([*parts, "nothing measured, nothing written"])
        parts.append(
            f"predicted from {self.probes} measurements in {self.passes or 0:.1f} calibration passes, "
            f"interaction {self.interaction:.2f}"
        )
        errors = [one.error for one in self.plans if one.error is not None]
        if errors:
            parts.append(f"prediction error of the built ones: median {100 * statistics.median(errors):.0f} %")
        if self.plan_file is not None:
            parts.append(f"moetools run {self.plan_file} builds the plan")
        return "; ".join(parts)
