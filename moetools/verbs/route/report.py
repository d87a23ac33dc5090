"""What `route-tasks` did and what it is worth: the record, its tables, and the output's README."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moetools.forward.metrics import ModelMetrics
from moetools.pipeline.table import Table
from moetools.printable import in_code, in_markdown, printable
from moetools.routing.classifier import FALL_BACK, ClassifierReport
from moetools.sizes import format_bytes
from moetools.verbs.route.levels import MeasuredLevel
from moetools.verbs.route.selection import Overlap, TaskSets


@dataclass(frozen=True, kw_only=True)
class MeasuredOutput:
    """One written checkpoint.

    Attributes:
        sets: its experts.
        size: measured on its headers.
        metrics: on the held-out text of every task.
        tuned: (step, held-out KL) of the router tuning; None without.
    """

    sets: TaskSets
    size: Mapping[str, int]
    metrics: ModelMetrics
    tuned: list[tuple[int, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """What a number of experts costs and keeps.

    Attributes:
        experts: per layer.
        nbytes, parameters: of a checkpoint with so many.
        share: task -> part of its score that its best ones have, mean over layers.
    """

    experts: int
    nbytes: int
    parameters: int
    share: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RouteReport:
    """The record of one run; `to_json` is what `moetools.json` in the output holds.

    Attributes:
        tokens: "calibration" and "test" -> task -> tokens.
        held_out: whether the test text was cut from the calibration text.
        full: the full model on the held-out text.
        scores: layer -> G x E, what every expert is worth to every task.
        expected_bytes: of all outputs together, an upper bound.
        seconds, peak_memory: wall time and most bytes in use by stage.
    """

    command: str
    out: str
    input_path: str
    input_fingerprint: str
    model_type: str
    num_experts: int
    top_k: int
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    tasks: tuple[str, ...]
    tokens: Mapping[str, Mapping[str, int]]
    held_out: bool
    before: Mapping[str, int]
    expected_bytes: int
    verified: bool
    dry_run: bool
    full: ModelMetrics | None = None
    outputs: tuple[MeasuredOutput, ...] = ()
    overlap: Overlap | None = None
    scores: Mapping[int, list[list[float]]] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    levels: tuple[MeasuredLevel, ...] = ()
    classifier: ClassifierReport | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able; perplexity and KL (nats per token) are on the held-out text."""
        plain = asdict(self)
        plain["verb"] = "route-tasks"
        for level, measured in zip(plain["levels"], self.levels, strict=True):
            level["label"] = measured.level.label
        return _with_text_keys(plain)

    def card(self) -> str:
        """README.md of the output."""
        outputs = "\n".join(
            f"| `{one.sets.name}/` | {one.sets.keep} | {format_bytes(one.size['bytes'])} | "
            + ", ".join(f"{one.metrics.tasks[task].perplexity:.2f}" for task in one.sets.tasks)
            + " |"
            for one in self.outputs
        )
        version = self.versions["moetools"]
        return f"""# Experts by task

Made from {in_code(self.input_path)} ({in_markdown(self.model_type)}, {self.num_experts} experts) by moetools {version}:

```
{printable(self.command)}
```

| checkpoint | experts | weights | perplexity on its held-out text |
|---|---|---|---|
{outputs}

Each folder loads in stock transformers. To use the experts of a task on the full checkpoint instead:

```python
import moetools.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(self.input_path)})
model.load_task_routing({json.dumps(self.out)})
model.set_task({json.dumps(self.tasks[0])})
```

`report.html` has the plots, `moetools.json` every number.
"""

    def tables(self) -> list[Table]:
        """Outputs, on-task and off-task quality, overlap, sizes, and what was measured beside."""
        if self.dry_run:
            return [self._dry()]
        tables = [self._outputs(), *self._matrices(), self._overlap(), self._curve()]
        tables += [table for table in (self._needed(), self._unions(), self._levels(), self._classifier()) if table]
        return tables

    def _dry(self) -> Table:
        rows = [
            [task, f"{count:,}", f"{self.tokens['test'][task]:,}"] for task, count in self.tokens["calibration"].items()
        ]
        note = f"all outputs together: {format_bytes(self.expected_bytes)} at most, written to {self.out}"
        return Table("route-tasks (dry run, nothing written)", ["task", "tokens", "held-out tokens"], rows, note)

    def _outputs(self) -> Table:
        assert self.full is not None
        full_row = [
            "full model",
            str(self.num_experts),
            _millions(self.before["parameters"]),
            _mb(self.before["bytes"]),
        ]
        rows = [[*full_row, "100.0", "", "", "", f"{self.full.tokens_per_second:,.0f}"]]
        for output in self.outputs:
            share = output.sets.share.values()
            ppl = [output.metrics.tasks[task].perplexity for task in output.sets.tasks]
            full = [self.full.tasks[task].perplexity for task in output.sets.tasks]
            rows.append(
                [
                    output.sets.name,
                    str(output.sets.keep),
                    _millions(output.size["parameters"]),
                    _mb(output.size["bytes"]),
                    f"{100 * sum(share) / len(share):.1f}",
                    " ".join(f"{value:.2f}" for value in ppl),
                    " ".join(f"{value:.2f}" for value in full),
                    " ".join(f"{_kl(output.metrics, task):.4f}" for task in output.sets.tasks),
                    f"{output.metrics.tokens_per_second:,.0f}",
                ]
            )
        columns = ["output", "experts", "parameters", "MB", "score kept %", "on-task PPL", "full PPL", "on-task KL"]
        verified = "every tensor and a probe's logits verified" if self.verified else "not verified"
        note = f"held-out text: {sum(self.tokens['test'].values()):,} tokens; {verified}; written to {self.out}"
        return Table(f"route-tasks by score {self.options['score']}", [*columns, "tokens/s"], rows, note)

    def _matrices(self) -> list[Table]:
        assert self.full is not None
        rows = [["full model", *(f"{self.full.tasks[task].perplexity:.2f}" for task in self.tasks)]]
        rows += [
            [output.sets.name, *(f"{output.metrics.tasks[task].perplexity:.2f}" for task in self.tasks)]
            for output in self.outputs
        ]
        kl = [
            [output.sets.name, *(f"{_kl(output.metrics, task):.4f}" for task in self.tasks)] for output in self.outputs
        ]
        note = "rows: experts chosen for; columns: tested on held-out text of"
        return [
            Table("perplexity", ["experts of", *self.tasks], rows, note),
            Table("KL to the full model, nats per token", ["experts of", *self.tasks], kl, note),
        ]

    def _overlap(self) -> Table:
        assert self.overlap is not None
        rows = []
        for layer, matrix in self.overlap.layers.items():
            pairs = [matrix[row][column] for row in range(len(matrix)) for column in range(row)]
            rows.append([str(layer), f"{sum(pairs) / len(pairs):.3f}", f"{min(pairs):.3f}", f"{max(pairs):.3f}"])
        verdict = "less than any" if self.overlap.mean < self.overlap.null_low else "no less than some"
        note = (
            f"mean {self.overlap.mean:.3f}: {verdict} of the draws with sequences dealt out at random (mean "
            f"{self.overlap.null_mean:.3f}, lowest {self.overlap.null_low:.3f}); random sets of these sizes: about "
            f"{self.overlap.same_size:.3f}"
        )
        return Table("overlap of the tasks' experts (Jaccard)", ["layer", "mean", "least", "most"], rows, note)

    def _curve(self) -> Table:
        rows = [
            [
                str(point.experts),
                _mb(point.nbytes),
                _millions(point.parameters),
                *(f"{100 * point.share[task]:.1f}" for task in self.tasks),
            ]
            for point in _thinned(self.curve)
        ]
        columns = ["experts", "MB", "parameters", *(f"{task} %" for task in self.tasks)]
        return Table("size and kept score over the number of experts", columns, rows)

    def _needed(self) -> Table | None:
        chosen = [
            output.sets for output in self.outputs if output.sets.needed is not None and len(output.sets.tasks) == 1
        ]
        if not chosen:
            return None
        rows = [[one.name, *(str(count) for count in (one.needed or {}).values()), str(one.keep)] for one in chosen]
        columns = ["task", *(f"layer {layer}" for layer in chosen[0].experts), "kept in every layer"]
        note = "stock transformers loads equal numbers in all layers only: the most demanding layer decides"
        return Table(f"experts that {100 * self.options['top_p']:g} % of the score needs", columns, rows, note)

    def _unions(self) -> Table | None:
        rows = []
        sizes = {output.sets.name: output for output in self.outputs}
        for output in self.outputs:
            if len(output.sets.tasks) == 1 or output.sets.needed is None:
                continue
            apart = sum(sizes[task].size["bytes"] for task in output.sets.tasks)
            needed = " ".join(map(str, output.sets.needed.values()))
            rows.append(
                [
                    output.sets.name,
                    needed,
                    str(output.sets.keep),
                    _mb(output.size["bytes"]),
                    _mb(apart),
                    _mb(self.before["bytes"]),
                ]
            )
        if not rows:
            return None
        columns = ["union", "experts needed by layer", "kept", "MB", "MB of its tasks apart", "MB of the full model"]
        return Table("unions", columns, rows)

    def _levels(self) -> Table | None:
        if not self.levels:
            return None
        assert self.full is not None
        rows = [["token (the model's own)", "causal", f"{self.full.perplexity or 0:.2f}", "0.0000", "100.0"]]
        for one in self.levels:
            name = one.level.label.rpartition(" (")[0]
            ahead = "causal" if one.causal else "LOOKS AHEAD"
            if one.metrics is None or one.metrics.agreement is None:
                rows.append([name, ahead, "", "", one.refused])
                continue
            found = one.metrics.agreement
            rows.append(
                [name, ahead, f"{one.metrics.perplexity or 0:.2f}", f"{found.kl:.4f}", f"{100 * found.top1:.1f}"]
            )
        columns = ["routing of the full model by", "", "PPL mean", "KL mean", "top-1 %"]
        return Table("routing level", columns, rows, "looking ahead is for evaluation and prompts: it cannot generate")

    def _classifier(self) -> Table | None:
        found = self.classifier
        if found is None:
            return None
        columns = ["task", *self.tasks, FALL_BACK]
        rows = [[task, *(str(counts[name]) for name in columns[1:])] for task, counts in found.confusion.items()]
        confident = (
            "none" if found.accuracy_confident is None else f"{100 * found.accuracy_confident:.1f} % of them right"
        )
        note = (
            f"accuracy {100 * found.accuracy:.1f} % on {found.prompts} held-out prompts of {found.prefix} tokens; "
            f"{100 * found.confident:.1f} % are surer than {found.threshold:g}: {confident}"
        )
        return Table(f"task by prompt ({found.kind})", columns, rows, note)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _thinned(curve: Sequence[CurvePoint], most: int = 16) -> list[CurvePoint]:
    """Evenly spaced points, the last among them."""
    step = -(-len(curve) // most)
    return list(curve[::-1][::step][::-1])


def _kl(metrics: ModelMetrics, task: str) -> float:
    found = metrics.tasks[task].agreement
    assert found is not None
    return found.kl


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f} M"
