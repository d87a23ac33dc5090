"""What `serve-check` found: the record and its table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moetools.pipeline.table import Table

Verdict = Literal["agrees", "differs", "fails", "refused", "not installed"]


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """How an engine got on.

    Attributes:
        form: what it loaded, relative to the checkpoint's folder.
        mean, largest: absolute differences of the prompt tokens' log-probabilities from ours, in nats.
        share: `mean` as a share of the standard deviation of our log-probabilities.
        same_tokens: whether it tokenizes the prompt as the checkpoint's tokenizer does; None where it was not asked.
        seconds: from starting its process to its answer.
        said: why it was not tried, or its error.
    """

    engine: str
    verdict: Verdict
    version: str = ""
    form: str = ""
    mean: float | None = None
    largest: float | None = None
    share: float | None = None
    same_tokens: bool | None = None
    seconds: float | None = None
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class ServeReport:
    """What `serve-check` found.

    Attributes:
        tokens: of the prompt.
        spread: standard deviation of our log-probabilities of the prompt's tokens, in nats.
        dtype: our compute dtype.
    """

    model: Path
    tokens: int
    spread: float
    tolerance: float
    dtype: str
    engines: Sequence[EngineResult]

    def to_json(self) -> dict[str, Any]:
        """Plain values; log-probabilities in nats."""
        return asdict(self) | {"model": str(self.model), "engines": [asdict(one) for one in self.engines]}

    def tables(self) -> list[Table]:
        """One row per engine."""
        columns = ["engine", "version", "loads", "verdict", "mean", "largest", "tokenizer", "seconds", "why"]
        note = (
            f"differences of the log-probabilities of {self.tokens - 1} tokens from ours ({self.dtype}), in nats; "
            f"agrees: mean at most {self.tolerance:.0%} of their standard deviation, {self.spread:.3g}"
        )
        return [Table("serving", columns, [_row(one) for one in self.engines], note)]


def _row(one: EngineResult) -> list[str]:
    differences = ["" if value is None else f"{value:.2g}" for value in (one.mean, one.largest)]
    tokenizer = {None: "", True: "same", False: "other tokens"}[one.same_tokens]
    seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
    return [one.engine, one.version, one.form, one.verdict, *differences, tokenizer, seconds, one.said]
