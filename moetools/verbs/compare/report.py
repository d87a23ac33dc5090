"""What `compare` found: the record, its table, and which models no other one beats."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moetools.forward.metrics import ModelSize
from moetools.pipeline.table import Table

_MARK = "*"


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One checkpoint.

    Attributes:
        size: bytes of its weight files, experts, parameters.
        format: how its weights are packed; "plain" where they are not.
        kl: mean divergence from the reference's predictions, nats per token; None where nothing was measured.
        perplexity: geometric mean over tasks.
        tasks: perplexity of every task.
        pareto: no other model is at most as large and at most as far off, and better in one of the two.
    """

    name: str
    path: Path
    is_reference: bool
    size: ModelSize
    format: str
    kl: float | None = None
    perplexity: float | None = None
    tasks: Mapping[str, float]
    pareto: bool = False

    @property
    def loss(self) -> float | None:
        """What the Pareto points are judged by: the KL, or the perplexity where there is no reference."""
        return self.perplexity if self.kl is None else self.kl


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    Attributes:
        models: the reference first, then the models in the order they were named.
        data: fingerprint of the text; None without text.
        num_tokens: real tokens in the text.
    """

    models: tuple[ComparedModel, ...]
    data: str | None
    num_tokens: int

    @property
    def has_kl(self) -> bool:
        """Whether there was a reference, and text."""
        return any(model.kl is not None for model in self.models)

    def to_json(self) -> dict[str, Any]:
        """Plain values; KL in nats per token, sizes in bytes."""
        return {"data": self.data, "tokens": self.num_tokens, "models": [_model_json(model) for model in self.models]}

    def tables(self) -> list[Table]:
        """One row per model."""
        rows = [_row(model) for model in self.models]
        return [Table("Comparison", list(rows[0]), [list(row.values()) for row in rows], self._note())]

    def _note(self) -> str:
        if self.data is None:
            return "sizes alone: `data` measures perplexity, with `reference` the KL divergence too"
        kind = "KL" if self.has_kl else "mean perplexity"
        return f"{_MARK}: no other model is both smaller and better (MB, {kind}); over {self.num_tokens:,} tokens"


def with_pareto(models: Sequence[ComparedModel]) -> tuple[ComparedModel, ...]:
    """The models, those marked that no other one beats; without a loss none is."""
    points = [(model.size.nbytes, model.loss) for model in models]
    return tuple(
        replace(model, pareto=on_frontier) for model, on_frontier in zip(models, pareto_points(points), strict=True)
    )


def pareto_points(points: Sequence[tuple[float, float | None]]) -> list[bool]:
    """Which of (size, loss) no other point beats: one that is at most as large in both and smaller in one.

    Points without a loss, or one that is not finite, are never marked and beat none.
    """
    known = [point for point in points if point[1] is not None and math.isfinite(point[1])]
    return [point in known and not any(_beats(other, point) for other in known) for point in points]


def _beats(one: tuple[float, float | None], other: tuple[float, float | None]) -> bool:
    assert one[1] is not None
    assert other[1] is not None
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _row(model: ComparedModel) -> dict[str, str]:
    row = {
        "Model": f"{model.name} (reference)" if model.is_reference else model.name,
        "MB": f"{model.size.nbytes / 1e6:,.2f}",
        "Experts": str(model.size.experts) if model.size.experts else "dense",
        "Bits": f"{model.size.bits_per_parameter:.2f}",
        "Format": model.format,
    }
    if model.kl is not None:
        row["KL"] = f"{round(model.kl, 4) + 0.0:.4f}"
    row |= {f"PPL {task}": f"{value:.2f}" for task, value in model.tasks.items()}
    if model.loss is not None:
        row["Pareto"] = _MARK if model.pareto else ""
    return row


def _model_json(model: ComparedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "reference": model.is_reference,
        **asdict(model.size),
        "bits_per_parameter": model.size.bits_per_parameter,
        "format": model.format,
        "kl": model.kl,
        "perplexity": model.perplexity,
        "tasks": dict(model.tasks),
        "pareto": model.pareto,
    }
