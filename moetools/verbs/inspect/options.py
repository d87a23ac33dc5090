"""What is asked of `inspect-routing`."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import STATISTICS, option


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Statistics that are saved or used again."""

    stats: Path | None = option(
        None,
        "Take statistics saved by `save_stats` instead of measuring them.",
        metavar="FILE",
        panel=STATISTICS,
        path="reads",
    )
    save_stats: Path | None = option(
        None,
        "Save the measured statistics for later runs.",
        metavar="FILE.safetensors",
        panel=STATISTICS,
        path="writes",
    )
