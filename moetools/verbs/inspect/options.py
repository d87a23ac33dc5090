"""What is asked of `inspect-routing`."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import OUTPUT, PLACEMENT, STATISTICS, option
from moetools.verbs.plots_option import plots_option


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """A checkpoint to compare routers with, statistics that are saved or used again, and devices for the experts."""

    compare: Path | None = option(
        None,
        "Another checkpoint of the same model: which share of its routers' choices agrees, layer by layer.",
        metavar="OTHER",
        path="reads",
    )
    html: Path | None = option(
        None,
        "Also write the report as one self-contained page: advice, pictures and all tables.",
        metavar="FILE.html",
        panel=OUTPUT,
        path="writes",
    )
    plots: Path | None = plots_option()
    similarity: bool = option(
        False, "Also measure how alike experts are, and show the clusters that merging by similarity would make."
    )
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
    devices: int | None = option(
        None,
        "Plan which of so many devices holds which experts (expert parallelism), judged on held-out text.",
        metavar="N",
        panel=PLACEMENT,
    )
    nodes: int = option(
        1,
        "Machines the devices belong to; router groups stay on one machine where they can be dealt out evenly.",
        metavar="N",
        panel=PLACEMENT,
    )
    replicas: int = option(
        0, "Further copies of busy experts that a layer may have, over all devices.", metavar="N", panel=PLACEMENT
    )
    expert_location: Path | None = option(
        None,
        "Write the plan as SGLang reads it (its option init-expert-location).",
        metavar="FILE.json",
        panel=PLACEMENT,
        path="writes",
    )
