"""What a run that reduced experts did: the report, its tables, and the model card."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moetools.formats.precision import PartPrecision
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import describe_memory
from moetools.methods.base import ExpertDecision
from moetools.methods.budget import Budget
from moetools.pipeline.estimate import expected_words
from moetools.pipeline.table import Table
from moetools.printable import in_code, in_markdown, printable
from moetools.sizes import format_bytes
from moetools.verbs.reduce.mtp_fate import mtp_words

_METHODS = {
    "reap": "REAP (arXiv 2510.13999)",
    "hc-smoe": "HC-SMoE (arXiv 2410.08589)",
    "ream": "REAM (arXiv 2604.04356)",
    "m-smoe": "M-SMoE (arXiv 2310.01334)",
    "mergemoe": "MergeMoE (arXiv 2510.14436)",
    "sub-moe": "Sub-MoE (arXiv 2506.23266)",
    "naee": "NAEE (arXiv 2402.14800)",
}
_LOADS = "transformers loads them after `import moetools.hf`, stock loaders refuse them"


@dataclass(frozen=True, kw_only=True)
class ReduceReport:
    """The record of one run; `to_json` is what `moetools.json` in the output holds.

    Attributes:
        before, after: experts per layer, parameters, bytes of tensors, number of weight files.
        layers: decision per MoE layer.
        load: share of routed slots per layer and expert, if it was measured.
        seconds, peak_memory: wall time and most bytes in use by stage.
        provenance: what the statistics were measured on.
        budget: how many experts the layers would keep if only their sum were given; None if nothing was measured.
        uneven: the budget was written; otherwise every layer has equally many.
        warnings: what the result rests on too little text for.
        precision: what became of packed weights: decoded, and written as what, or kept; empty for a plain input.
        parts: how each part of the model is stored, before and after.
        unchecked: why moetools' own reader alone verified the output, not stock transformers; empty where both did.
        mtp: what became of multi-token-prediction layers; None where there are none.
        healing: steps, what was trained, and the held-out KL on the way; None without `heal`.
    """

    verb: str
    method: str
    command: str
    out: str
    versions: Mapping[str, str]
    seed: int
    input_path: str
    input_fingerprint: str
    model_type: str
    provenance: Mapping[str, Any] | None
    before: Mapping[str, int]
    after: Mapping[str, int]
    layers: Mapping[int, ExpertDecision]
    load: Mapping[int, list[float]] | None
    verified: bool
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]
    memory: MemoryPlan
    dry_run: bool = False
    budget: Budget | None = None
    uneven: bool = False
    warnings: tuple[str, ...] = ()
    precision: str = ""
    parts: Mapping[str, PartPrecision] = field(default_factory=dict)
    unchecked: str = ""
    mtp: Mapping[str, Any] | None = None
    healing: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        apart = ("layers", "memory", "load", "budget", "parts")
        plain = {key: value for key, value in self.__dict__.items() if key not in apart}
        plain["parts"] = {name: part.to_json() for name, part in self.parts.items()}
        layers = {str(index): asdict(decision) for index, decision in self.layers.items()}
        load = None if self.load is None else {str(index): shares for index, shares in self.load.items()}
        memory = asdict(self.memory) | {"expected_peak": self.memory.peak}
        budget = None
        if self.budget is not None:
            experts = {str(index): count for index, count in self.budget.experts.items()}
            budget = asdict(self.budget) | {"experts": experts}
        return plain | {"layers": layers, "load": load, "memory": memory, "budget": budget}

    def tables(self) -> list[Table]:
        """Sizes before and after, then one row per layer."""
        tables = [self._sizes(), *([self._parts()] if self.precision else [])]
        if self.layers:
            tables.append(self._decisions())
        if self.healing is not None:
            tables.append(self._healing())
        if self.warnings:
            tables.append(Table(title="warnings", columns=["what"], rows=[[text] for text in self.warnings], note=""))
        return tables

    def _sizes(self) -> Table:
        verified = "every tensor and the probe's logits verified" if self.verified else "not verified"
        if self.unchecked:
            verified += f", by moetools' reader alone: {self.unchecked}"
        note = expected_words(self.seconds) if self.dry_run else verified
        notes = [note, self.precision, mtp_words(self.mtp), f"memory: {describe_memory(self.memory)}"]
        rows = [
            ["experts per layer", str(self.before["experts"]), experts_after(self)],
            ["weights", format_bytes(self.before["bytes"]), format_bytes(self.after["bytes"])],
        ]
        if not self.dry_run:
            rows.insert(1, ["parameters", f"{self.before['parameters']:,}", f"{self.after['parameters']:,}"])
            rows += [["seconds " + phase, "", f"{seconds:.1f}"] for phase, seconds in self.seconds.items()]
        return Table(
            title=f"{self.verb} by {self.method}: {self.out}" + (" (dry run, nothing written)" if self.dry_run else ""),
            columns=["", "before", "after"],
            rows=rows,
            note="; ".join(filter(None, notes)),
        )

    def _parts(self) -> Table:
        rows = [[name, part.before, part.after if part.changed else "unchanged"] for name, part in self.parts.items()]
        return Table(title="precision", columns=["part", "before", "after"], rows=rows)

    def _healing(self) -> Table:
        assert self.healing is not None
        rows = [[str(step), f"{kl:.5f}"] for step, kl in self.healing["curve"]]
        title = f"healing: {self.healing['trained']}, step {self.healing['best_step']} kept"
        return Table(title=title, columns=["step", "held-out KL"], rows=rows)

    def _decisions(self) -> Table:
        rows = []
        for index, decision in self.layers.items():
            row = [str(index), " ".join("+".join(map(str, cluster)) for cluster in decision.clusters)]
            if self.load is not None:
                kept = {expert for cluster in decision.clusters for expert in cluster}
                row.append(f"{100 * sum(self.load[index][expert] for expert in kept):.1f}")
            if self.budget is not None:
                row.append(str(self.budget.experts[index]))
            rows.append(row)
        columns = ["layer", "new experts from old"] + (["routed slots kept %"] if self.load is not None else [])
        if self.budget is None:
            return Table(title="decisions", columns=columns, rows=rows)
        lost, uniform = 100 * self.budget.lost, 100 * self.budget.lost_uniform
        note = (
            f"uneven: experts per layer that would lose the least {self.budget.measure} at the same sum, "
            f"{lost:.1f} % instead of {uniform:.1f} %; "
            + (_LOADS if self.uneven else "not written, stock transformers loads equal numbers only")
        )
        return Table(title="decisions", columns=[*columns, "uneven"], rows=rows, note=note)

    def card(self) -> str:
        """README.md of the output: what it was made from, how, and how to make it again."""
        made = _METHODS.get(self.method, self.method)
        precision = f"\nThe weights are {self.precision}.\n" if self.precision else ""
        drafts = mtp_words(self.mtp)
        precision += f"\n{drafts.capitalize()}.\n" if drafts else ""
        loading = f"\nIts layers have different numbers of experts: {_LOADS}.\n" if self.uneven else ""
        return f"""---
library_name: transformers
tags: [moe, {self.verb}, moetools]
---

# {in_markdown(self.out.rstrip("/").rpartition("/")[2])}

Made from {in_code(self.input_path)} ({in_markdown(self.model_type)}) by moetools {self.versions["moetools"]}:
`{self.verb}`, {made}.

| | before | after |
|---|---|---|
| experts per layer | {self.before["experts"]} | {experts_after(self)} |
| parameters | {self.before["parameters"]:,} | {self.after["parameters"]:,} |
| weights | {format_bytes(self.before["bytes"])} | {format_bytes(self.after["bytes"])} |
{precision}
```
{printable(self.command)}
```
{loading}
The decision for every layer, the input's fingerprint and all versions are in `moetools.json`.
"""


def experts_after(report: ReduceReport) -> str:
    """Experts per layer of the output; the least and the most where layers differ."""
    counts = report.budget.experts.values() if report.uneven and report.budget is not None else ()
    return f"{min(counts)} to {max(counts)}" if counts else str(report.after["experts"])


def layer_warnings(decisions: Mapping[int, ExpertDecision]) -> list[str]:
    """What was warned of while single layers were decided."""
    found: list[str] = []
    for decision in decisions.values():
        refit = decision.details.get("refit")
        for facts in (decision.details, refit if isinstance(refit, Mapping) else {}):
            warning = facts.get("warning")
            found += [warning] if isinstance(warning, str) else []
    return found
