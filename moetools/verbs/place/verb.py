"""Reorder experts so that devices which hold consecutive ones are loaded evenly."""

from pathlib import Path

from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.pipeline.carry_out import carry_out
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.place.options import PlaceOptions
from moetools.verbs.place.report import PlaceReport
from moetools.verbs.place.work import PlaceWork


def place_experts(
    model: Path,
    out: Path,
    options: PlaceOptions,
    text: DataOptions,
    forward: ForwardOptions,
    writing: Writing,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> PlaceReport:
    """Write the checkpoint with its experts in another order; it computes the same.

    Raises:
        MoetoolsError: see `PlaceWork` and `carry_out`; nothing is left in place of `out`.
    """
    work = PlaceWork(model, text, forward, options, command=command, progress=progress)
    report = carry_out(work, out, writing)
    assert isinstance(report, PlaceReport)
    return report
