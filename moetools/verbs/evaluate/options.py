"""What is asked of `evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import option


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is asked of `evaluate`."""

    reference: Path | None = option(
        None, "The original, for KL divergence and agreement.", metavar="MODEL", path="reads"
    )
    choices: list[str] = option([], "Multiple-choice items (.jsonl). Repeat it for several tasks.", metavar="NAME=PATH")
    gate: list[str] = option(
        [],
        "Exit with 3 if a model misses this bound, such as 'kl<=0.05'. Repeat it for several bounds.",
        metavar="METRIC<=VALUE",
    )
