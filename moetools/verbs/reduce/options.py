"""What is asked of `prune-experts` and `merge-experts`."""

from dataclasses import dataclass
from pathlib import Path

from moetools.arguments import RECIPE, STATISTICS, option
from moetools.plugins import plugin_names
from moetools.verbs.mtp_option import mtp_option
from moetools.verbs.output_format_option import output_format_option

PRUNE_METHODS = (*plugin_names("moetools.methods.prune"), "explicit", "auto")
MERGE_METHODS = (*plugin_names("moetools.methods.merge"), "auto")
HEALED_PARTS = ("router", "experts", "all")


@dataclass(frozen=True, kw_only=True)
class ReduceOptions:
    """What both verbs take."""

    method: str | None = None
    ratio: float | None = option(
        None, "Share of experts to remove, 0 < R < 1; E experts become (1 - R) * E, rounded.", metavar="R"
    )
    refit: str | None = None
    sequential: bool | None = option(
        None,
        "Measure behind the already compressed layers, or once on the original.",
        flags="--sequential/--one-shot",
        panel=RECIPE,
    )
    allow_uneven: bool = option(
        False,
        "Spread the experts over the layers by what they contribute; the output then loads with moetools.hf only.",
        panel=RECIPE,
    )
    heal: int = option(
        0,
        "Train the result for that many steps of 4 sequences towards the original's predictions; both models must fit "
        "in memory.",
        metavar="STEPS",
        panel=RECIPE,
    )
    heal_train: str = option(
        "all",
        "router: the routers alone; experts: routers and experts; all: every parameter.",
        metavar="WHAT",
        panel=RECIPE,
        choices=lambda: HEALED_PARTS,
    )
    heal_data: list[str] = option(
        [],
        "Text to heal on, in random order and whatever `samples`; all the text of `data` if not given.",
        metavar="NAME=PATH",
        panel=RECIPE,
    )
    mtp: str | None = mtp_option()
    output_format: str | None = output_format_option()
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

    @property
    def target(self) -> int | None:
        """Experts every layer has afterwards, if they were given as a number."""
        raise NotImplementedError

    def recipe(self) -> dict[str, object]:
        """Settings in place of the method's own, None for those that were not given."""
        return {"refit": self.refit, "sequential": self.sequential}


@dataclass(frozen=True, kw_only=True)
class PruneOptions(ReduceOptions):
    """What is asked of `prune-experts`."""

    keep: int | None = option(None, "Experts to keep in every layer.", metavar="N")
    method: str | None = option(
        None,
        f"One of {', '.join(PRUNE_METHODS)}. reap if not given, explicit with `experts`.",
        metavar="NAME",
        choices=lambda: PRUNE_METHODS,
    )
    experts: str | list[int] | dict[int, list[int]] | None = option(
        None,
        "Experts to keep: 0,2,5 for every layer, or a JSON file with such a list or with one per layer.",
        metavar="LIST",
    )
    refit: str | None = option(
        None,
        "joint: solve all down projections of a layer anew for the original's hidden states; none: leave them. The "
        "method's own way if not given.",
        metavar="HOW",
        panel=RECIPE,
        choices=lambda: ("none", "joint"),
    )

    @property
    def target(self) -> int | None:
        return self.keep


@dataclass(frozen=True, kw_only=True)
class MergeOptions(ReduceOptions):
    """What is asked of `merge-experts`."""

    to: int | None = option(None, "Experts to end with in every layer; 1 makes the layers dense.", metavar="N")
    method: str | None = option(
        "joint", f"One of {', '.join(MERGE_METHODS)}.", metavar="NAME", choices=lambda: MERGE_METHODS
    )
    combine: str | None = option(
        None,
        "average: sum the members' weights; subspace: sum them in the directions they share; neurons: keep the "
        "members' neurons the layer's output needs most. The method's own way if not given.",
        metavar="HOW",
        panel=RECIPE,
        choices=lambda: ("average", "subspace", "neurons"),
    )
    rank: float | None = option(
        None, "Share of the directions that `combine=subspace` keeps.", metavar="SHARE", panel=RECIPE
    )
    router: str | None = option(
        None,
        "Router rows of new experts: mean or centroid of the members', or fitted to their joint logit.",
        metavar="ROWS",
        panel=RECIPE,
        choices=lambda: ("mean", "centroid", "fitted"),
    )
    refit: str | None = option(
        None,
        "joint: solve all down projections of a layer anew for the original's hidden states; members: each for its "
        "members' mean output; none: leave them. The method's own way if not given.",
        metavar="HOW",
        panel=RECIPE,
        choices=lambda: ("none", "joint", "members"),
    )
    align: bool | None = option(
        None,
        "Put the members' neurons in one order before they are averaged.",
        flags="--align/--no-align",
        panel=RECIPE,
    )

    @property
    def target(self) -> int | None:
        return self.to

    def recipe(self) -> dict[str, object]:
        own = {"combine": self.combine, "rank": self.rank, "router": self.router, "align": self.align}
        return super().recipe() | own
