"""What a run that made a student did: the report, its tables, and the model card."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import describe_memory
from moetools.passes.student_layers import LayerFit
from moetools.pipeline.records import versions
from moetools.pipeline.table import Table
from moetools.printable import in_code, in_markdown, printable
from moetools.sizes import format_bytes
from moetools.verbs.train.report import TrainingReport


@dataclass(frozen=True, kw_only=True)
class StudentReport:
    """The record of one run; `to_json` is what `moetools.json` in the output holds.

    Attributes:
        families: model types of teacher and student.
        width, active_width: of the student's FFN, and what a token uses in the teacher.
        layers, parameters, nbytes: of teacher and student; bytes are those of the tensors on disk.
        settings: what determines every byte.
        fits: per layer, before any training of the whole student.
        warning: why the student is not a dense model; None where it is.
        precision: that the teacher's packed weights were decoded; empty for a plain teacher.
    """

    command: str
    out: str
    teacher: str
    teacher_fingerprint: str
    data: str
    families: tuple[str, str]
    width: int
    active_width: int
    layers: tuple[int, int]
    parameters: tuple[int, int]
    nbytes: tuple[int, int]
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
    fits: Sequence[LayerFit]
    warning: str | None
    precision: str
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]
    memory: MemoryPlan
    verified: bool
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        plain = {key: value for key, value in self.__dict__.items() if key not in ("fits", "memory")}
        memory = asdict(self.memory) | {"expected_peak": self.memory.peak}
        return {"verb": "distill", "versions": versions(), **plain, "fits": [asdict(fit) for fit in self.fits]} | {
            "memory": memory
        }

    def tables(self) -> list[Table]:
        """Sizes of teacher and student, then how well each layer was fitted."""
        return [self._sizes(), *([self._fits()] if self.fits else [])]

    def _sizes(self) -> Table:
        rows = [
            ["family", *self.families],
            ["layers", *map(str, self.layers)],
            ["FFN neurons per token", str(self.active_width), str(self.width)],
            ["parameters", *(f"{count:,}" for count in self.parameters)],
            ["weights", *(format_bytes(count) for count in self.nbytes)],
        ]
        rows += [[f"seconds {phase}", "", f"{seconds:.1f}"] for phase, seconds in self.seconds.items()]
        done = "every tensor and the probe's logits verified" if self.verified else "not verified"
        notes = ["nothing written" if self.dry_run else done, f"memory: {describe_memory(self.memory)}"]
        title = f"distill from {self.options['init']}: {self.out}" + (" (dry run)" if self.dry_run else "")
        return Table(
            title=title,
            columns=["", "teacher", "student"],
            rows=rows,
            note="; ".join(filter(None, [*notes, self.precision, self.warning])),
        )

    def _fits(self) -> Table:
        rows = [
            [
                str(fit.layer),
                f"{fit.error_init:.3f}",
                f"{fit.error:.3f}",
                f"{fit.cosine:.3f}",
                "/".join(map(str, fit.neurons)),
            ]
            for fit in self.fits
        ]
        return Table(
            title="FFN of every layer before training",
            columns=["teacher's layer", "relative L2, start", "fitted", "cosine", "neurons"],
            rows=rows,
            note="on held-out sequences, against what the layer should add to the student's hidden states",
        )

    def card(self) -> str:
        """README.md of the output: what it was made from, how, and how to make it again."""
        teacher, student = self.families
        precision = f"\nThe weights are {self.precision}.\n" if self.precision else ""
        return f"""---
library_name: transformers
tags: [distillation, moetools]
---

# {in_markdown(self.out.rstrip("/").rpartition("/")[2])}

A {student} model distilled from the Mixture-of-Experts {in_code(self.teacher)} ({in_markdown(teacher)}) by moetools
{versions()["moetools"]}: FFN width {self.width}, initialisation `{self.options["init"]}`.

| | teacher | student |
|---|---|---|
| layers | {self.layers[0]} | {self.layers[1]} |
| parameters | {self.parameters[0]:,} | {self.parameters[1]:,} |
| weights | {format_bytes(self.nbytes[0])} | {format_bytes(self.nbytes[1])} |
{precision}
```
{printable(self.command)}
```

How well every layer was fitted, the teacher's fingerprint and all versions are in `moetools.json`.
"""


@dataclass(frozen=True, kw_only=True)
class DistillReport:
    """What a run of `distill` did.

    Attributes:
        made: how the student was made; None for one that existed.
        training: None without any.
        notes: what a dry run says of the training.
    """

    command: str
    out: str
    made: StudentReport | None
    training: TrainingReport | None
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]
    verified: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        own: dict[str, Any] = {"verb": "distill", "command": self.command, "out": self.out, "versions": versions()}
        if self.made is not None:
            own |= self.made.to_json()
        own |= {"training": None if self.training is None else self.training.to_json(), "notes": self.notes}
        return own | {"seconds": self.seconds, "peak_memory": self.peak_memory, "verified": self.verified}

    def tables(self) -> list[Table]:
        """How the student was made, and how its training went."""
        tables = [] if self.made is None else self.made.tables()
        if self.training is not None:
            tables += self.training.tables(self.out)
        if self.notes:
            tables.append(
                Table(title="dry run: nothing written", columns=["note"], rows=[[note] for note in self.notes])
            )
        return tables

    def card(self) -> str:
        """README.md of the output."""
        if self.training is not None:
            return self.training.card(self.out.rstrip("/").rpartition("/")[2], self.command)
        assert self.made is not None
        return self.made.card()
