"""What a training did: the record, its tables, and the output's README."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetools.pipeline.records import versions
from moetools.pipeline.table import Table
from moetools.printable import in_code, in_markdown, printable
from moetools.sizes import format_bytes


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a training did.

    Attributes:
        student, teacher: folders.
        part: what was trained.
        parameters: trained, and all of the student's.
        options: settings of the training.
        curve: held-out loss on the way; the last line may be worse than `best_step`'s, whose weights were written.
        baseline: the same student trained without the teacher, and the share of the sparse gain kept; None without.
        cached: bytes of the teacher's cached predictions; None where the teacher ran beside the student.
    """

    student: str
    teacher: str
    part: str
    parameters: tuple[int, int]
    options: Mapping[str, Any]
    curve: Sequence[Mapping[str, float]]
    steps: int
    best_step: int
    tokens: int
    seconds: float
    stopped: str | None
    baseline: Mapping[str, Any] | None = None
    cached: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {**self.__dict__, "options": plain(self.options)}

    def facts(self) -> dict[str, Any]:
        """What the report of another verb says of it: steps, what was trained, the held-out KL on the way."""
        return {
            "steps": self.steps,
            "trained": self.part,
            "best_step": self.best_step,
            "tokens": self.tokens,
            "curve": [(int(point["step"]), point["divergence"]) for point in self.curve],
        }

    def tables(self, out: str) -> list[Table]:
        """The course of the training, and the baseline."""
        tables = [self._course(out)]
        if self.baseline is not None:
            tables.append(self._against_baseline(self.baseline))
        return tables

    def _course(self, out: str) -> Table:
        trained, every = self.parameters
        speed = f"{self.seconds:.0f} s ({self.tokens / max(self.seconds, 1e-9):,.0f} per second)"
        notes = [
            f"{trained:,} of {every:,} parameters, {self.tokens:,} tokens in {speed}",
            f"weights of step {self.best_step}",
            *([f"stopped: {self.stopped}"] if self.stopped else []),
            *([f"teacher cached in {format_bytes(self.cached)}"] if self.cached is not None else []),
        ]
        names = ("loss", "divergence", "cross_entropy")
        return Table(
            title=f"training {self.part}: {out}",
            columns=["step", "held-out loss", "divergence", "cross-entropy", "seconds"],
            rows=[
                [f"{point['step']:.0f}", *(f"{point[name]:.4f}" for name in names), f"{point['seconds']:.0f}"]
                for point in self.curve
            ],
            note="; ".join(notes),
        )

    def _against_baseline(self, baseline: Mapping[str, Any]) -> Table:
        entropies, kept = baseline["cross_entropy"], baseline["gain_kept"]
        share = "the teacher is no better than the baseline" if kept is None else f"{100 * kept:.1f} % of the gain kept"
        return Table(
            title=f"against the same student trained without the teacher ({baseline['kind']})",
            columns=["", "cross-entropy"],
            rows=[[name, f"{value:.4f}"] for name, value in entropies.items()],
            note=f"{share}, {baseline['steps']} steps each; held-out sequences of the training text",
        )

    def card(self, name: str, command: str) -> str:
        """README.md of the output: what was trained, towards what, and how to do it again."""
        first, last = self.curve[0], next(one for one in self.curve if one["step"] == self.best_step)
        return f"""---
library_name: transformers
tags: [distillation, moetools]
---

# {in_markdown(name)}

Trained by moetools {versions()["moetools"]} towards the predictions of the Mixture-of-Experts
{in_code(self.teacher)}:
{self.best_step} steps, {self.tokens:,} tokens, {self.parameters[0]:,} of {self.parameters[1]:,} parameters.

| on held-out sequences | before | after |
|---|---|---|
| divergence from the teacher (nats per token) | {first["divergence"]:.4f} | {last["divergence"]:.4f} |
| cross-entropy (nats per token) | {first["cross_entropy"]:.4f} | {last["cross_entropy"]:.4f} |

```
{printable(command)}
```

How it was made, settings and versions are in `moetools.json`, the course of the training in `metrics.jsonl`.
"""


def plain(value: Any) -> Any:
    """The same with paths as text, in dicts of any depth."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return str(value) if isinstance(value, Path) else value
