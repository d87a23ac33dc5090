"""What `evaluate` found: the record and its tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetools.forward.generate import START, GenerationMetrics
from moetools.forward.metrics import PERCENTILES, Agreement, ModelMetrics
from moetools.pipeline.table import Table
from moetools.sizes import format_bytes
from moetools.verbs.evaluate.harness import Difference, HarnessScore, difference
from moetools.verbs.evaluate.structured import StructuredMetrics


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """A gate applied to one model."""

    model: str
    gate: str
    value: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """One row of the comparison."""

    name: str
    path: Path
    is_reference: bool
    metrics: ModelMetrics
    generation: GenerationMetrics | None = None
    sampled: GenerationMetrics | None = None
    structured: StructuredMetrics | None = None
    harness: tuple[HarnessScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        models: the reference first, then the models in the order they were named.
        data: fingerprint of the texts; None without texts.
        num_tokens: real tokens in the texts.
        dtype, device: how the models were run.
    """

    models: tuple[EvaluatedModel, ...]
    gates: tuple[GateResult, ...]
    data: str | None
    num_tokens: int
    dtype: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; KL in nats per token, shares from 0 to 1, memory in bytes; null where not finite."""
        return {
            "data": self.data,
            "tokens": self.num_tokens,
            "dtype": self.dtype,
            "device": self.device,
            "models": [_model_json(model, self.models[0]) for model in self.models],
            "gates": [asdict(result) for result in self.gates],
        }

    def tables(self) -> list[Table]:
        """The comparison; KL percentiles per task, with a reference; accuracies, with multiple choice."""
        tables = [_comparison(self.models, self.num_tokens)]
        if any(model.metrics.agreement for model in self.models):
            tables.append(_percentiles(self.models))
        if any(model.metrics.choices for model in self.models):
            tables.append(_accuracies(self.models))
        if any(model.generation for model in self.models):
            tables.append(_generation("Greedy", [(model, model.generation) for model in self.models]))
        if any(model.sampled for model in self.models):
            tables.append(_generation("Sampled", [(model, model.sampled) for model in self.models]))
        if any(model.structured for model in self.models):
            tables.append(_structured(self.models))
        if any(model.harness for model in self.models):
            tables.append(_harness(self.models))
        return tables


def _model_json(model: EvaluatedModel, first: EvaluatedModel) -> dict[str, Any]:
    metrics, size = model.metrics, model.metrics.size
    return {
        "name": model.name,
        "path": str(model.path),
        "reference": model.is_reference,
        **asdict(size),
        "bits_per_parameter": size.bits_per_parameter,
        "tokens_per_second": metrics.tokens_per_second,
        "peak_memory": metrics.peak_memory,
        "perplexity": _finite(metrics.perplexity),
        "agreement": _agreement_json(metrics.agreement),
        "tasks": {
            name: {
                "targets": task.targets,
                "perplexity": _finite(task.perplexity),
                "agreement": _agreement_json(task.agreement),
            }
            for name, task in metrics.tasks.items()
        },
        "choices": {name: asdict(found) for name, found in metrics.choices.items()},
        "generation": None if model.generation is None else asdict(model.generation),
        "sampled": None if model.sampled is None else asdict(model.sampled),
        "structured": None if model.structured is None else asdict(model.structured),
        "harness": [
            asdict(one) | {"difference": None if found is None else asdict(found)}
            for one, found in _differences(model, first)
        ],
    }


def _differences(model: EvaluatedModel, first: EvaluatedModel) -> list[tuple[HarnessScore, Difference | None]]:
    """Every score, with its difference from the reference's where there is one."""
    known = {(one.task, one.metric): one for one in first.harness} if first.is_reference else {}
    compared = not model.is_reference and bool(known)
    return [(one, difference(one, known[one.task, one.metric]) if compared else None) for one in model.harness]


def _agreement_json(agreement: Agreement | None) -> dict[str, Any] | None:
    return None if agreement is None else asdict(agreement)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _label(model: EvaluatedModel) -> str:
    return f"{model.name} (reference)" if model.is_reference else model.name


def _comparison(models: Sequence[EvaluatedModel], num_tokens: int) -> Table:
    """One row per model; KL columns only where there is something to compare with."""
    rows = [_comparison_row(model) for model in models]
    predicted = sum(task.targets for task in models[0].metrics.tasks.values())
    over = f"perplexity and KL over {predicted:,} of {num_tokens:,} tokens; mean perplexity is geometric"
    note = over if num_tokens else ""
    return Table("Evaluation", list(rows[0]), [list(row.values()) for row in rows], note)


def _comparison_row(model: EvaluatedModel) -> Mapping[str, str]:
    metrics, size = model.metrics, model.metrics.size
    row = {
        "Model": _label(model),
        "Experts": str(size.experts),
        "Parameters": f"{size.parameters / 1e6:,.2f} M",
        "MB": f"{size.nbytes / 1e6:,.2f}",
    }
    row |= {f"PPL {name}": f"{task.perplexity:.2f}" for name, task in metrics.tasks.items()}
    if metrics.perplexity is not None:
        row["PPL mean"] = f"{metrics.perplexity:.2f}"
    if metrics.agreement is not None:
        row["KL mean"] = _nats(metrics.agreement.kl)
        row["KL 99 %"] = _nats(metrics.agreement.kl_percentiles["99"])
        row["Top-1 %"] = f"{100 * metrics.agreement.top1:.1f}"
    speed = f"{metrics.tokens_per_second:,.0f}" if metrics.tokens_per_second else ""
    return row | {"Tokens/s": speed, "Peak memory": format_bytes(metrics.peak_memory)}


def _percentiles(models: Sequence[EvaluatedModel]) -> Table:
    columns = [
        "Model",
        "Task",
        "Mean",
        *(f"{percentile} %" for percentile in PERCENTILES),
        "Max",
        "Top-1 %",
        "Correlation",
    ]
    rows = []
    for model in models:
        if model.is_reference:
            continue
        per_task = [(name, task.agreement) for name, task in model.metrics.tasks.items()]
        for name, found in [*per_task, ("all", model.metrics.agreement)]:
            assert found is not None
            correlation = "" if found.correlation is None else f"{found.correlation:.4f}"
            values = [found.kl, *(found.kl_percentiles[percentile] for percentile in PERCENTILES), found.kl_max]
            rows.append([model.name, name, *map(_nats, values), f"{100 * found.top1:.1f}", correlation])
    return Table("KL to the reference, nats per token", columns, rows, "all: mean over tasks, percentiles over tokens")


def _accuracies(models: Sequence[EvaluatedModel]) -> Table:
    sets = models[0].metrics.choices
    columns = ["Model", *(f"{name} ({found.items})" for name, found in sets.items())]
    rows = [
        [
            _label(model),
            *(f"{100 * one.accuracy:.1f} ± {100 * one.standard_error:.1f}" for one in model.metrics.choices.values()),
        ]
        for model in models
    ]
    return Table("Multiple choice, % right (items)", columns, rows, "± one standard error")


def _generation(kind: str, models: Sequence[tuple[EvaluatedModel, GenerationMetrics | None]]) -> Table:
    columns = ["Model", "Looping %", "Ended %", "Tokens", "Distinct %", "Compression", "Agreed %", "Same start %"]
    rows, note = [], ""
    for model, found in models:
        if found is None:
            continue
        looping, ended, distinct, agreed, same = (
            "" if value is None else f"{100 * value:.1f}"
            for value in (found.looping, found.ended, found.distinct, found.agreed, found.same_start)
        )
        length, compression = f"{found.length:.1f}", f"{found.compression:.2f}"
        rows.append([_label(model), looping, ended, length, distinct, compression, agreed, same])
        note = (
            f"{found.prompts} continuations, {found.tokens} tokens each at most. looping: does not end and repeats "
            "itself at last; distinct: of runs of 4 tokens; compression: by zlib, about 1 without repetition; agreed: "
            f"of the reference's tokens before the first other one; same start: the first {START} tokens"
        )
    return Table(f"{kind} continuations", columns, rows, note)


def _structured(models: Sequence[EvaluatedModel]) -> Table:
    rows = []
    for model in models:
        found = model.structured
        if found is not None:
            shares = (found.valid_json, found.valid_calls)
            rows.append([_label(model), *("" if value is None else f"{100 * value:.1f}" for value in shares)])
            columns = ["Model", f"JSON % ({found.json_prompts})", f"Tool calls % ({found.call_prompts})"]
    return Table("Valid answers (chats)", columns, rows, "JSON: of the schema; tool calls: of the tools, at least one")


def _harness(models: Sequence[EvaluatedModel]) -> Table:
    columns = ["Model", "Task", "Metric", "Value", "Questions", "Recovery %", "Difference, 95 %", "McNemar p"]
    rows = []
    for model in models:
        for one, found in _differences(model, models[0]):
            error = "" if one.standard_error is None else f" ± {one.standard_error:.4f}"
            cells = [_label(model), one.task, one.metric, f"{one.value:.4f}{error}", str(len(one.questions) or "")]
            rows.append([*cells, *_difference_cells(found)])
    note = "against the reference on the same questions; an interval that holds 0, or a p above .05, may be chance"
    return Table("Evaluation harness", columns, rows, note if models[0].is_reference else "")


def _difference_cells(found: Difference | None) -> list[str]:
    if found is None:
        return [""] * 3
    return [
        "" if found.recovery is None else f"{100 * found.recovery:.1f}",
        "" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}",
        "" if found.p is None else f"{found.p:.3f}",
    ]


def _nats(value: float) -> str:
    # Rounding noise just below zero shall not print as -0.0000.
    return f"{round(value, 4) + 0.0:.4f}"
